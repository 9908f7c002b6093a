"""RandLoRA: a sum of many fixed random products of rank r, with trained weights, so that the update has full rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive
from .signs import signs


@dataclass(frozen=True)
class RandLora(AdapterKind):
    """`dW = c sum_j B_j diag(l_j) A diag(g_j)`, where l [N, r] is trained from zero and N = ceil(min(d_out, d_in) / r).

    Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    https://arxiv.org/abs/2502.00987, eq. 3. A [r, d_in], B_j [d_out, r] and g_j [d_in] are random and fixed, equal in
    layers of equal shape. Differences from the paper: they are random signs, which are the same on every machine, and
    not uniform or normal numbers; and g_j is fixed, where the paper trains it from a constant. With l = 0 that constant
    has no gradient, and the update has rank r as long as it stays one. With g_j fixed the update is linear in l, so
    that FedAvg over l gives the mean of the updates. A client uploads about min(d_out, d_in) numbers for a layer.
    Cost: as many operations as the layer itself, and factors of that size beside it, shared by layers of equal shape.
    A result has full rank, so that its LoRA checkpoint is about twice as large as the weights: 186 MB for the attention
    of SmolLM2-135M, which takes 10 s of one core to write in each round, in a process of 2.3 GB.

    Args:
        scale: c = scale / max(d_out, d_in). 20 is alpha / r of the paper's experiments.
        seed: another one gives other fixed tensors.
    """

    scale: float = 20.0
    seed: int = 0

    name: ClassVar[str] = "randlora"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("randlora", scale=self.scale)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"l": (math.ceil(min(place.d_out, place.d_in) / place.rank), place.rank)}

    def rank(self, parts: Parts) -> int:
        return parts["l"].shape[1]

    def constants(self, place: Place) -> dict[str, Tensor]:
        count = self.shapes(place)["l"][0]
        return {
            "A": signs("randlora.A", self.seed, place.rank, place.d_in),
            "B": signs("randlora.B", self.seed, place.d_out, count * place.rank),
            "g": signs("randlora.g", self.seed, count, place.d_in),
        }

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        inner = (x.unsqueeze(-2) * constants["g"]) @ constants["A"].T  # [..., N, r]
        return self._factor(place) * ((inner * parts["l"]).flatten(-2) @ constants["B"].T)

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        A, g = constants["A"].to(parts["l"]), constants["g"].to(parts["l"])
        rows = parts["l"].unsqueeze(-1) * A * g.unsqueeze(1)  # [N, r, d_in]
        return LoraFactors(A=rows.flatten(0, 1), B=constants["B"].to(rows), scaling=self._factor(place))

    def _factor(self, place: Place) -> float:
        return self.scale / max(place.d_out, place.d_in)
