"""FedOpt: an optimizer on the server, which takes the change of a round as its gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate

from ..base import ServerState
from .wrapper import Wrapper, innermost

_FIRST, _SECOND = "server-optimizer.first", "server-optimizer.second"


@dataclass(frozen=True)
class ServerOptimizer(Wrapper):
    """Steps along D, the change of the inner strategy's factors in a round, entry by entry; m and v are its moments.

    - "momentum": `m = beta1 m + D`, `x = x + lr m`. FedAvgM, Hsu et al. 2019, https://arxiv.org/abs/1909.06335.
    - the others: `m = beta1 m + (1 - beta1) D`, `x = x + lr m / (sqrt(v) + tau)`, with v = tau^2 at first and without
      bias correction; "adam": `v = beta2 v + (1 - beta2) D^2`; "yogi": `v = v - (1 - beta2) D^2 sign(v - D^2)`;
      "adagrad": `v = v + D^2`. FedOpt, Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2.

    The factors are the server's, at its own scaling. Tensors trained in full have moments too. A row of A or column of
    B that a round does not change (a frozen factor, a module without replies) keeps its bits, and so do its moments.
    If the inner strategy sets a column of B to zero, because no client of the round has that rank, its row starts anew
    with zero moments, since the momentum belongs to a B that no longer exists.
    Memory: one more copy of the adapter, or two.

    Args:
        inner: a steady strategy; rows of A must mean the same from one round to the next.
        kind: the rule for m, v and x, as above.
        lr: the server's learning rate. With "momentum", lr = 1 and beta1 = 0, the result is that of `inner` alone. The
            other kinds make steps of about `lr` whatever the size of D, and need values such as 0.01.
        beta1: decay of the first moment m, in [0, 1); 0.9 as in the papers' experiments.
        beta2: decay of the second moment v, in [0, 1); 0.99 as in FedOpt's experiments.
        tau: added to the root of v, above 0; the larger, the less steps depend on v. 1e-3 as in FedOpt's experiments.
    """

    kind: Literal["momentum", "adam", "yogi", "adagrad"] = "momentum"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.steady:
            raise StrategyError(
                f"strategy.server-optimizer = {self.kind} adds up changes over rounds, but "
                f"{type(innermost(self.inner)).__name__} does not keep rows of A from round to round; "
                "set strategy.server-optimizer = none",
                needs="steady",
            )
        for name, value, good, expected in (
            ("lr", self.lr, 0 < self.lr < float("inf"), "a number above 0"),
            ("beta1", self.beta1, 0 <= self.beta1 < 1, "0 or more, below 1"),
            ("beta2", self.beta2, 0 <= self.beta2 < 1, "0 or more, below 1"),
            ("tau", self.tau, 0 < self.tau < float("inf"), "a number above 0"),
        ):
            if not good:
                raise StrategyError(f"strategy.server-{name} = {value}, expected {expected}")

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's next state, with the optimizer's step in place of the inner strategy's own change."""
        new = self.inner.aggregate(state, updates, number)
        first, second = (state.memory.get(key, AdapterState()) for key in (_FIRST, _SECOND))
        lora, lora_m, lora_v = dict(new.adapter.lora), dict(first.lora), dict(second.lora)
        for name, old in state.adapter.lora.items():
            after = first_ranks(new.adapter.lora[name], old.rank, old.scaling)
            m, v = first.lora.get(name), second.lora.get(name)
            gone = old.B.any(dim=0) & ~after.B.any(dim=0)
            found_a = self._step(old.A, after.A, m and m.A, v and v.A, rows=1, gone=gone[:, None])
            found_b = self._step(old.B, after.B, m and m.B, v and v.B, rows=0, gone=gone[None, :])
            found_r: tuple[Tensor | None, ...] = (None, None, None)
            if old.R is not None and after.R is not None:
                found_r = self._step(old.R, after.R, m and m.R, v and v.R)
            lora[name], lora_m[name], lora_v[name] = (
                LoraFactors(A=a, B=b, scaling=old.scaling, R=r)
                for a, b, r in zip(found_a, found_b, found_r, strict=True)
            )
        dense, dense_m, dense_v = dict(new.adapter.tensors), dict(first.tensors), dict(second.tensors)
        for name, old in state.adapter.tensors.items():
            found = self._step(old, new.adapter.tensors[name], first.tensors.get(name), second.tensors.get(name))
            dense[name], dense_m[name], dense_v[name] = found
        memory = {**new.memory, _FIRST: AdapterState(lora=lora_m, tensors=dense_m)}
        if self.kind != "momentum":
            memory[_SECOND] = AdapterState(lora=lora_v, tensors=dense_v)
        return replace(new, adapter=AdapterState(lora=lora, tensors=dense), memory=memory)

    def _step(
        self,
        old: Tensor,
        after: Tensor,
        m: Tensor | None,
        v: Tensor | None,
        *,
        rows: int | None = None,
        gone: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next `(x, m, v)` of one tensor.

        Args:
            old: the tensor before the round.
            after: the tensor in the inner strategy's next state.
            m: the first moment; None in the first round.
            v: the second moment; None in the first round.
            rows: the dimension along which the entries of a row (or column) lie; None: the whole tensor is one row.
            gone: mask of the rows that start anew with the inner strategy's values.
        """
        m = torch.zeros_like(after) if m is None else m
        v = torch.full_like(after, self.tau**2) if v is None else v
        change = after - old
        if self.kind == "momentum":
            next_m, next_v = self.beta1 * m + change, v
            x = old + self.lr * next_m
        else:
            square = change.square()
            next_m = self.beta1 * m + (1 - self.beta1) * change
            if self.kind == "adam":
                next_v = self.beta2 * v + (1 - self.beta2) * square
            elif self.kind == "yogi":
                next_v = v - (1 - self.beta2) * square * torch.sign(v - square)
            else:
                next_v = v + square
            x = old + self.lr * next_m / (next_v.sqrt() + self.tau)
        same = old == after
        same = same.all() if rows is None else same.all(dim=rows, keepdim=True)
        x, m, v = torch.where(same, old, x), torch.where(same, m, next_m), torch.where(same, v, next_v)
        if gone is None:
            return x, m, v
        return torch.where(gone, after, x), m.masked_fill(gone, 0.0), v.masked_fill(gone, self.tau**2)
