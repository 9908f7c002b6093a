"""VeRA: two trained vectors around fixed random matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..state import LoraFactors
from .base import AdapterKind, Parts, Place
from .signs import signs


@dataclass(frozen=True)
class Vera(AdapterKind):
    """`dW = diag(b) B diag(d) A`, where b [d_out] is trained from zero and d [r] from `d_initial`.

    Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", https://arxiv.org/abs/2310.11454, eq. 2.
    A [r, d_in] and B [d_out, r] are random and fixed, equal in layers of equal shape. Difference from the paper: their
    entries are random signs, which are the same on every machine, with the variance of the paper's Kaiming uniform
    numbers. The update is a product of b and d, so that the mean of the parts is not the mean of the updates. There is
    no scaling, and `lora.alpha` is not used. A client uploads d_out + r numbers for a layer.

    Args:
        d_initial: first value of d; 0.1 as in the paper.
        seed: another one gives other fixed matrices.
    """

    d_initial: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "vera"

    def __post_init__(self) -> None:
        if not self.d_initial or abs(self.d_initial) == float("inf"):
            raise ConfigError(
                f"lora.kind-options: vera's d_initial = {self.d_initial}, expected a number that is not 0, since "
                "neither b nor d would have a gradient"
            )

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"b": (place.d_out,), "d": (place.rank,)}

    def rank(self, parts: Parts) -> int:
        return len(parts["d"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        return {"b": torch.zeros(place.d_out), "d": torch.full((place.rank,), self.d_initial)}

    def constants(self, place: Place) -> dict[str, Tensor]:
        return {
            "A": signs("vera.A", self.seed, place.rank, place.d_in),
            "B": signs("vera.B", self.seed, place.d_out, place.rank),
        }

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        inner = F.linear(x, constants["A"]) * parts["d"]
        return self._factor(place) * F.linear(inner, constants["B"]) * parts["b"]

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        b, d = parts["b"], parts["d"]
        A, B = constants["A"].to(d), constants["B"].to(d)
        return LoraFactors(A=d[:, None] * A, B=b[:, None] * B, scaling=self._factor(place))

    def _factor(self, place: Place) -> float:
        """The standard deviations of A's and of B's entries: Kaiming uniform's, sqrt(2 / d_in) and sqrt(2 / r)."""
        return 2.0 / (place.d_in * place.rank) ** 0.5
