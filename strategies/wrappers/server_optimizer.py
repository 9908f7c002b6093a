"""FedOpt: the server takes the change of a round for a gradient, and its own optimizer makes the step."""

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
    """`D = inner's factors - the old ones`, entry by entry; `m` and `v` are its moments:

    - "momentum": `m = beta1 m + D`, `x = x + lr m`. FedAvgM, Hsu et al. 2019, https://arxiv.org/abs/1909.06335.
    - the others: `m = beta1 m + (1 - beta1) D`, `x = x + lr m / (sqrt(v) + tau)`, v = tau^2 at first, without bias
      correction; "adam": `v = beta2 v + (1 - beta2) D^2`; "yogi": `v = v - (1 - beta2) D^2 sign(v - D^2)`;
      "adagrad": `v = v + D^2`. FedOpt, Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2.

    The factors are the server's, at its own scaling; tensors trained in full have their moments too. A row of A or
    column of B that a round leaves as it was (a frozen factor, a module without replies) stays bitwise, and so do
    its moments: no reply spoke of it. Where the inner strategy sets a column of B to zero, since no sampled client
    has that rank, the row starts anew with zero moments: momentum would go on from a B that is gone.
    Memory: one more copy of the adapter, or two.

    Args:
        inner: a strategy that is steady: rows of A must mean the same in the next round.
        kind: see above.
        lr: the server's learning rate. 1 with momentum and beta1 = 0 is `inner` itself; the adaptive kinds make
            steps of about `lr` whatever the size of D, and want values such as 0.01.
        beta1: decay of the first moment, in [0, 1); 0.9 as in the papers' experiments.
        beta2: decay of the second, in [0, 1); 0.99 as in FedOpt's experiments.
        tau: the degree of adaptivity, above 0; 1e-3 as in FedOpt's experiments.
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
                f"strategy.server-optimizer = {self.kind} adds up changes over rounds, and "
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

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The inner strategy's next state, with the optimizer's step in place of its own."""
        new = self.inner.aggregate(state, updates, round)
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
        """`(x, m, v)` of one tensor.

        Args:
            old: before the round.
            after: what the inner strategy made of it.
            m: the first moment; None at first.
            v: the second moment; None at first.
            rows: the dimension along which entries are a row; None: the tensor is one.
            gone: the rows that start anew at the inner strategy's values.
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
