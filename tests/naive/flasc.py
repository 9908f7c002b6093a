"""FLASC in plain loops: the entries of two factors that a client gets, and the mean of changes. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


def top(values: list[float], share: float) -> list[float]:
    """The values with all but the largest ones set to zero."""
    count = int(-(-share * len(values) // 1))
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    return [value if i in order[:count] else 0.0 for i, value in enumerate(values)]


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling = A.double(), B.double(), scaling
        self.sent: list[tuple[Tensor, Tensor]] = []  # to the clients of the round, in their order

    def of(self, share: float) -> tuple[Tensor, Tensor]:
        kept = top([*self.A.flatten().tolist(), *self.B.flatten().tolist()], share)
        a, b = kept[: self.A.numel()], kept[self.A.numel() :]
        return torch.tensor(a).double().reshape(self.A.shape), torch.tensor(b).double().reshape(self.B.shape)

    def send(self, share: float) -> tuple[Tensor, Tensor]:
        self.sent.append(self.of(share))
        return self.sent[-1]

    def aggregate(self, parts: Sequence[Part]) -> None:
        changes = [(part.A - A, part.B - B) for part, (A, B) in zip(parts, self.sent, strict=True)]
        self.A = self.A + mean([a for a, _ in changes], shares(parts))
        self.B = self.B + mean([b for _, b in changes], shares(parts))
        self.sent = []

    def total(self) -> Tensor:
        return product(self.B, self.A, self.scaling)
