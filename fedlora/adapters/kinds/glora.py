"""GLoRA's linear paths: one pair of factors scales the frozen weight entry by entry, another one is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algebra import uniform
from ..state import LoraFactors
from .base import WEIGHT, AdapterKind, Parts, Place, whole


@dataclass(frozen=True)
class GLora(AdapterKind):
    """`dW = W * (B_1 A_1) + B_2 A_2`, where * is entry by entry; all four factors have rank r.

    Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
    https://arxiv.org/abs/2306.07967, eq. 9: its A and B, both as pairs of factors. Its C, D and E, which change the
    bias, are left out, and so is the search for the paths of each layer. B_1 = B_2 = 0 at first. The update is a
    product of factors, so that the mean of the parts is not the mean of the updates. `lora.alpha` is not used. A client
    uploads 2 r (d_in + d_out) numbers for a layer. W * (B_1 A_1) has full rank: a result has no small factors, and its
    LoRA checkpoint is about twice as large as the weights. Cost: a matrix of W's size in fp32 stays in memory for each
    layer and client from the forward pass to the backward pass, and so does the dequantized W.
    """

    name: ClassVar[str] = "glora"
    needs_weight: ClassVar[bool] = True
    sees_layer: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        down, up = (place.rank, place.d_in), (place.d_out, place.rank)
        return {"A1": down, "B1": up, "A2": down, "B2": up}

    def rank(self, parts: Parts) -> int:
        return len(parts["A1"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        drawn = {name: uniform(shapes[name], generator) for name in ("A1", "A2")}
        return {name: torch.zeros(shape) for name, shape in shapes.items()} | drawn

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        scaled = constants[WEIGHT] * (parts["B1"] @ parts["A1"])
        return F.linear(x, scaled) + F.linear(F.linear(x, parts["A2"]), parts["B2"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        W = constants[WEIGHT].to(parts["A1"])
        return whole(W * (parts["B1"] @ parts["A1"]) + parts["B2"] @ parts["A2"])
