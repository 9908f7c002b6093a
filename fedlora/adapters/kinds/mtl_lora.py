"""MTL-LoRA: clients share A and several B, and each mixes them in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..algebra import uniform
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class MtlLora(AdapterKind):
    """`dW_t = c (sum_i softmax(w_t / tau)_i B_i) L_t A`, with A and n matrices B_i shared, L_t [r, r] and w_t [n]
    personal.

    Yang et al. 2024, "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", https://arxiv.org/abs/2410.09437. A task
    t is a client here: its L_t and w_t stay on it, and the strategy averages A and the B_i alone. They are trained all
    together, as in the paper. At first L_t = I and B_i = 0; w_t is drawn as in the authors' code, but equal for all
    clients, whose w_t part from each other as they train. With w = 0 all B_i would stay equal. The mean of the parts is
    not the mean of the updates. With n = 1 and L_t = I it is LoRA. The server never sees a client's own model, so that
    clients have to evaluate. A client uploads r (d_in + n d_out) numbers for a layer. `lora.alpha` is not used.

    Args:
        matrices: n, the number of B_i.
        tau: temperature of the softmax; a small one picks one B_i.
        scale: c, which is LoRA's alpha / r.
    """

    matrices: int = 3
    tau: float = 0.1
    scale: float = 2.0

    name: ClassVar[str] = "mtllora"
    personal: ClassVar[frozenset[str]] = frozenset({"L", "w"})

    def __post_init__(self) -> None:
        if self.matrices < 1:
            raise ConfigError(f"lora.kind-options: mtl-lora's matrices = {self.matrices}, expected at least 1")
        check_positive("mtl-lora", tau=self.tau, scale=self.scale)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        rank, count = place.rank, self.matrices
        return {"A": (rank, place.d_in), "B": (count, place.d_out, rank), "L": (rank, rank), "w": (count,)}

    def rank(self, parts: Parts) -> int:
        return len(parts["A"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        A, w = (uniform(shapes[part], generator) for part in ("A", "w"))
        return {"A": A, "B": torch.zeros(shapes["B"]), "L": torch.eye(place.rank), "w": w}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return self.scale * F.linear(F.linear(F.linear(x, parts["A"]), parts["L"]), self._mixed(parts))

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        return LoraFactors(A=parts["L"] @ parts["A"], B=self._mixed(parts), scaling=self.scale)

    def _mixed(self, parts: Parts) -> Tensor:
        """The client's own B [d_out, r]."""
        return torch.tensordot(torch.softmax(parts["w"] / self.tau, dim=0), parts["B"], dims=1)
