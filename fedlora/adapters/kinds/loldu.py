"""LoLDU: trained changes of the first pivots in an LDU decomposition of the frozen weight; the mean is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..lowrank import ldu
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class LoLdu(AdapterKind):
    """`dW = c (P L)_r diag(z) U_r`, where W = P L D U and z [r], the change of D's first entries, is trained from zero.

    Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
    Fine-Tuning", https://arxiv.org/abs/2410.13618; L and U have ones on their diagonals, and r counts columns of P L
    and rows of U. Differences from the authors' code: they train D's entries and take their first product out of W, and
    here z is what is added to D (their start "lu"), so that a quantized W stays as it is; they train c as well, and
    here it is fixed, since the mean of products is no product of means; and W is the dequantized weight. Server and
    clients decompose it in fp64. The update is linear in z, so that FedAvg over z gives the mean of the updates. A
    client uploads r numbers for a layer, so that ranks are to be large: the authors take 768. `lora.alpha` is not used.

    Args:
        scale: c, which is the authors' alpha / r.
    """

    scale: float = 1.0

    name: ClassVar[str] = "loldu"
    linear: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("loldu", scale=self.scale)

    def check_place(self, place: Place) -> None:
        if place.rank > min(place.d_out, place.d_in):
            raise ConfigError(
                f"lora.kind = loldu at rank {place.rank}: {place.module}, {place.d_out} x {place.d_in}, has only "
                f"{min(place.d_out, place.d_in)} pivots; lower lora.rank, or set lora.rank-pattern"
            )

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"z": (place.rank,)}

    def rank(self, parts: Parts) -> int:
        return len(parts["z"])

    def constants(self, place: Place) -> dict[str, Tensor]:
        lower, _, upper = ldu(place.weight(), place.rank)
        return {"A": upper.float(), "B": lower.float()}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return self.scale * F.linear(F.linear(x, constants["A"]) * parts["z"], constants["B"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        z = parts["z"]
        return LoraFactors(A=z[:, None] * constants["A"].to(z), B=constants["B"].to(z), scaling=self.scale)
