"""LoRA itself: dW = scaling B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import initial
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place


@dataclass(frozen=True)
class Lora(AdapterKind):
    """Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, eq. 3.

    The parts are A [r, d_in] and B [d_out, r]. They are sent as factors, so that clients may have unequal ranks, and
    every strategy works with them. The mean of the factors is not the mean of the updates.
    """

    name: ClassVar[str] = "lora"
    pairs: ClassVar[bool] = True

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"A": (place.rank, place.d_in), "B": (place.d_out, place.rank)}

    def rank(self, parts: Parts) -> int:
        return len(parts["A"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = {place.module: (place.d_out, place.d_in)}
        made = initial(shapes, lambda _: place.rank, lambda _: place.scaling, generator).lora[place.module]
        return {"A": made.A, "B": made.B}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return place.scaling * F.linear(F.linear(x, parts["A"]), parts["B"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        return LoraFactors(A=parts["A"], B=parts["B"], scaling=place.scaling)
