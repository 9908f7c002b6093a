"""MiSS: one trained matrix over sums of input features, so that the mean of adapters is the mean of updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import LoraFactors
from .base import AdapterKind, Parts, Place


@dataclass(frozen=True)
class Miss(AdapterKind):
    """`dW = D' E`, where D [r, d_out] is trained from zero and E [r, d_in] = [I I ...] is fixed.

    Row i of E sums the input features j with j mod r = i. Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA
    with an Efficient Shard-Sharing Structure" (first called Bone), https://arxiv.org/abs/2409.15371. The update is
    linear in D, so that FedAvg over D gives the mean of the updates. There is no scaling, and `lora.alpha` is not used.
    A client uploads r d_out numbers for a layer, instead of LoRA's r (d_in + d_out).
    """

    name: ClassVar[str] = "miss"
    linear: ClassVar[bool] = True

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"D": (place.rank, place.d_out)}

    def rank(self, parts: Parts) -> int:
        return len(parts["D"])

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        D = parts["D"]
        rank = D.shape[0]
        shards = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank)).sum(dim=-2)
        return shards @ D

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        D = parts["D"]
        columns = torch.arange(place.d_in, device=D.device) % len(D)
        return LoraFactors(A=F.one_hot(columns, len(D)).T.to(D), B=D.T.contiguous(), scaling=1.0)
