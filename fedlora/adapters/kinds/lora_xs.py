"""LoRA-XS: a small trained matrix between leading singular vectors of the frozen weight, so that the mean is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..lowrank import of_matrix
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class LoraXs(AdapterKind):
    """`dW = c U_r R S_r V_r'`, where R [r, r] is trained from zero, and U_r, S_r, V_r are the SVD of the frozen W.

    Balazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    https://arxiv.org/abs/2405.17604, eq. 2; the singular values stand on the side of the input, as in the authors'
    code. Differences: the authors draw R from a Gaussian of deviation 1e-5, here R = 0, so that the start is the base
    itself; and W is the dequantized weight where the base is quantized. Server and clients compute U_r, S_r and V_r in
    fp64, with the largest entry of each column of U_r positive. The update is linear in R, so that FedAvg over R gives
    the mean of the updates. A client uploads r^2 numbers for a layer. `lora.alpha` is not used.

    Args:
        scale: c, which is the paper's alpha / r.
    """

    scale: float = 1.0

    name: ClassVar[str] = "loraxs"
    linear: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("lora-xs", scale=self.scale)

    def check_place(self, place: Place) -> None:
        if place.rank > min(place.d_out, place.d_in):
            raise ConfigError(
                f"lora.kind = lora-xs at rank {place.rank}: {place.module}, {place.d_out} x {place.d_in}, has only "
                f"{min(place.d_out, place.d_in)} singular vectors; lower lora.rank, or set lora.rank-pattern"
            )

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"R": (place.rank, place.rank)}

    def rank(self, parts: Parts) -> int:
        return len(parts["R"])

    def constants(self, place: Place) -> dict[str, Tensor]:
        u, s, vh = of_matrix(place.weight(), place.rank)
        return {"A": (s[:, None] * vh).float(), "B": u.float()}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        inner = F.linear(F.linear(x, constants["A"]), parts["R"])
        return self.scale * F.linear(inner, constants["B"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        R = parts["R"]
        return LoraFactors(A=R @ constants["A"].to(R), B=constants["B"].to(R), scaling=self.scale)
