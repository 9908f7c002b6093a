"""DoRA: LoRA on the direction of each row of the weight, and a trained length of the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import uniform
from ..state import LoraFactors
from .base import OUTPUT, WEIGHT, AdapterKind, Parts, Place, check_positive

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Dora(AdapterKind):
    """`W + dW = diag(m_0 + m) V / |V|`, `V = W + c B A`: |V| and m_0 = |W| are the norms of rows; m [d_out], A, B
    trained.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353, eq. 5; |V| is a
    constant for the gradient, as in Section 4.3. A row of W belongs to one output, as in PEFT. Differences: what is
    trained is the change m of the lengths, from zero, so that the server needs no weights for the start, and weight
    decay draws to the base's lengths instead of to zero; under dropout the layer's own output is not dropped. The
    update is a product of m, B and A over a norm, so that the mean of the parts is not the mean of the updates. It has
    full rank and no small factors: checkpoints are PEFT's DoRA. A client uploads r (d_in + d_out) + d_out numbers for a
    layer. Cost: each step dequantizes W once more, for W A'.

    Args:
        scale: c, which is LoRA's alpha / r; `lora.alpha` is not used.
    """

    scale: float = 2.0

    name: ClassVar[str] = "dora"
    needs_weight: ClassVar[bool] = True
    sees_layer: ClassVar[bool] = True
    factored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("dora", scale=self.scale)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"A": (place.rank, place.d_in), "B": (place.d_out, place.rank), "m": (place.d_out,)}

    def rank(self, parts: Parts) -> int:
        return len(parts["A"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        A = uniform((place.rank, place.d_in), generator)
        return {"A": A, "B": torch.zeros(place.d_out, place.rank), "m": torch.zeros(place.d_out)}

    def constants(self, place: Place) -> dict[str, Tensor]:
        return {"n": place.weight().double().square().sum(dim=1).float()}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        ratio = (constants["n"].sqrt() + parts["m"]) / self._norms(parts, constants)
        low = self.scale * F.linear(F.linear(x, parts["A"]), parts["B"])
        return (ratio - 1) * constants[OUTPUT] + ratio * low

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        return LoraFactors(A=parts["A"], B=parts["B"], scaling=self.scale)

    def magnitude(self, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return constants["n"].to(parts["m"]).sqrt() + parts["m"]

    def of_magnitude(self, factors: LoraFactors, magnitude: Tensor, constants: Parts) -> dict[str, Tensor]:
        m = magnitude - constants["n"].to(magnitude).sqrt()
        return {"A": factors.A * (factors.scaling / self.scale), "B": factors.B, "m": m}

    def _norms(self, parts: Parts, constants: Parts) -> Tensor:
        """|V|: the norms of the rows of W + c B A, from those of W and products with A. They have no gradient."""
        A, B, W = parts["A"].detach(), parts["B"].detach(), constants[WEIGHT]
        cross = ((W @ A.T) * B).sum(dim=1)
        own = ((B @ (A @ A.T)) * B).sum(dim=1)
        return (constants["n"] + 2 * self.scale * cross + self.scale**2 * own).clamp(min=_TINY).sqrt()
