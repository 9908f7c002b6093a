"""Distances between clients' updates, and from each client's start to its end, from factors and in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, inner, relative_error, stack
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate

from ..base import ServerState, whole_adapter

# A difference of fp64 Gram entries below this share of |dW_i|^2 + |dW_j|^2 has lost half of its digits.
_CANCELLED = 1e-8


def squared_distances(updates: Sequence[ClientUpdate], state: ServerState) -> Tensor:
    """`|dW_i - dW_j|^2`, summed over all modules and over the tensors trained in full, [K, K] in fp64.

    `<dW_i, dW_j>` is the sum over block (i, j) of `(B'B) * (A A')`, where B and A are the stacks of all clients. Where
    the difference `<i, i> + <j, j> - 2 <i, j>` cancels, it is computed again by QR. For a factor or a module that a
    client did not send, the server's is taken.

    Args:
        updates: the replies of K clients.
        state: the state from which the round started.
    """
    count = len(updates)
    total = torch.zeros(count, count, dtype=torch.float64)
    states, server = [whole_adapter(update, state) for update in updates], state.adapter
    for name in dict.fromkeys(name for each in states for name in each.lora):
        held = [each.lora[name] if name in each.lora else server.lora[name] for each in states]
        parts = [LoraFactors(A=f.down.double(), B=f.B.double(), scaling=f.scaling) for f in held]
        every = stack(parts)
        owner = torch.repeat_interleave(torch.arange(count), torch.tensor([part.rank for part in parts]))
        mine = torch.nn.functional.one_hot(owner, count).to(every.A)
        gram = mine.T @ ((every.B.T @ every.B) * (every.A @ every.A.T)) @ mine
        gram = (gram + gram.T) / 2
        sizes = gram.diagonal()[:, None] + gram.diagonal()
        squares = (sizes - 2 * gram).clamp(min=0.0)
        for i, j in torch.nonzero((squares < _CANCELLED * sizes).triu(1)).tolist():
            exact = relative_error({"": parts[i]}, {"": parts[j]}) ** 2 * gram[j, j]
            squares[i, j] = squares[j, i] = exact
        total += squares.fill_diagonal_(0.0).cpu()
    for name in dict.fromkeys(name for each in states for name in each.tensors):
        rows = [(each.tensors[name] if name in each.tensors else server.tensors[name]).double() for each in states]
        flat = torch.stack(rows).flatten(1)
        total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    return total


def started_from(update: ClientUpdate) -> AdapterState:
    """What a client was sent.

    Raises:
        StrategyError: the reply does not say; a server's replies do.
    """
    if update.start is None:
        raise StrategyError(f"client {update.client_id}: its ClientUpdate has no start, which this rule measures from")
    return update.start


@dataclass(frozen=True)
class Move:
    """The straight line from a client's start to its end, `factors = start + c (end - start)` with c from 0 to 1.

    At c, the update s B A differs from that of the start by `c X + c^2 Y`, with `X = s (B dA + dB A)` and
    `Y = s dB dA`, where dA and dB are the differences between end and start.

    Args:
        xx: the inner product `<X, X>`.
        xy: the inner product `<X, Y>`.
        yy: the inner product `<Y, Y>`.
    """

    xx: float
    xy: float
    yy: float

    @classmethod
    def of(cls, update: ClientUpdate) -> Move:
        """From what the client was sent to what it sent back."""
        start, xx, xy, yy = started_from(update), 0.0, 0.0, 0.0
        for name, end in update.adapter.lora.items():
            f = start.lora[name]
            A, B = f.A.double(), f.B.double()
            if end.R is not None and f.R is not None:  # only the core R was trained
                core = LoraFactors(A=A, B=B, scaling=f.scaling, R=end.R.double() - f.R.double())
                xx += inner(core, core)
                continue
            dA = end.A.double() - A if end.A.numel() else torch.zeros_like(A)
            dB = end.B.double() - B if end.B.numel() else torch.zeros_like(B)
            x = LoraFactors(A=torch.cat([dA, A]), B=torch.cat([B, dB], dim=1), scaling=f.scaling)
            y = LoraFactors(A=dA, B=dB, scaling=f.scaling)
            xx, xy, yy = xx + inner(x, x), xy + inner(x, y), yy + inner(y, y)
        for name, tensor in update.adapter.tensors.items():
            xx += float((tensor.double() - start.tensors[name].double()).square().sum())
        return cls(xx, xy, yy)

    def norm(self, share: float) -> float:
        square = share**2 * (self.xx + 2 * share * self.xy + share**2 * self.yy)
        return math.sqrt(max(square, 0.0))

    def share(self, limit: float) -> float:
        """The c at which the distance from the start is `limit`, by bisection; the end must be farther than that."""
        low, high = 0.0, 1.0
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if self.norm(middle) <= limit else (low, middle)
        return low
