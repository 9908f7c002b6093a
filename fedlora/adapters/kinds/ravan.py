"""RAVAN: several heads of trained r x r matrices between fixed random bases, with a trained scale for each head."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive
from .signs import signs

_BITS = 4  # of the random numbers from which the bases are made


@dataclass(frozen=True)
class Ravan(AdapterKind):
    """`dW = c sum_i s_i B_i H_i A_i` over h heads; H_i [r, r] is trained from zero, and s_i from 1.

    Raje et al. 2025, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
    https://arxiv.org/abs/2506.05568. [B_1 ... B_h] has orthonormal columns and [A_1; ...; A_h] orthonormal rows, random
    and fixed, equal in layers of equal shape. After training, a client sends s_i H_i in the place of H_i, and s_i = 1
    (`settled`): the mean of what is sent is the mean of the updates, exactly. A client uploads h (r^2 + 1) numbers for
    a layer, where `lora.rank` is r. A checkpoint is a LoRA adapter of rank h r. Cost: as LoRA of rank h r.

    With unequal ranks, r is the largest one, and client k of rank r_k trains h r_k / r of the heads, which must be a
    whole number: the same heads in all layers, and other ones in the next round (`SomeGroups`). It computes with all
    heads, keeps the others frozen, and uploads its own alone. The server averages each head over the clients that
    trained it, by their rows; a head that nobody trained stays as it was.

    It is an adapter kind, which `fedavg` averages, and no strategy: a strategy's core R is one matrix, all of which is
    trained, with no place for heads and their scales.

    Experimental: the paper is known here from its abstract and notes. That H starts at zero and s at 1, the number of
    heads and the absence of a scale c are not confirmed. Nor is how the heads of smaller clients are chosen: here each
    client takes turns with all of them. The bases are the Q of random matrices, computed in fp64 and rounded to fp32,
    so that machines agree to that rounding.

    Args:
        heads: h. In each layer, h r must be at most min(d_out, d_in).
        scale: c; `lora.alpha` is not used.
        seed: another one gives other bases.
    """

    heads: int = 4
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "ravan"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ConfigError(f"lora.kind-options: ravan's heads = {self.heads}, expected at least 1")
        check_positive("ravan", scale=self.scale)

    def check_place(self, place: Place) -> None:
        most = min(place.d_out, place.d_in)
        if self.heads * place.rank > most:
            raise ConfigError(
                f"lora.kind = ravan with {self.heads} heads of rank {place.rank}: {place.module}, {place.d_out} x "
                f"{place.d_in}, has only {most} orthogonal directions; lower lora.rank, or heads in lora.kind-options"
            )

    @property
    def groups(self) -> tuple[frozenset[str], ...]:
        """H_i and s_i of each head."""
        return tuple(frozenset({f"H{head}", f"s{head}"}) for head in range(self.heads))

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        cores = {f"H{head}": (place.rank, place.rank) for head in range(self.heads)}
        return {**cores, **{f"s{head}": (1,) for head in range(self.heads)}}

    def rank(self, parts: Parts) -> int:
        """r, or the share of it that the heads among these parts are of all heads."""
        cores = [value for part, value in parts.items() if part.startswith("H")]
        return sum(len(core) for core in cores) // self.heads

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        make = {"H": torch.zeros, "s": torch.ones}
        return {part: make[part[0]](shape) for part, shape in self.shapes(place).items()}

    def constants(self, place: Place) -> dict[str, Tensor]:
        columns = self.heads * place.rank
        return {
            "A": _orthonormal("ravan.A", self.seed, place.d_in, columns),
            "B": _orthonormal("ravan.B", self.seed, place.d_out, columns),
        }

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        low = (x @ constants["A"]).unflatten(-1, (self.heads, -1))
        inner = torch.einsum("hij,...hj->...hi", self._cores(parts), low)
        return self.scale * F.linear(inner.flatten(-2), constants["B"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        cores = torch.block_diag(*self._cores(parts))
        return LoraFactors(A=cores @ constants["A"].to(cores).T, B=constants["B"].to(cores), scaling=self.scale)

    def settled(self, parts: Parts) -> Parts:
        """Each head's scale, multiplied into its matrix."""
        cores = {f"H{head}": core for head, core in enumerate(self._cores(parts))}
        return {part: cores[part] if part in cores else torch.ones_like(value) for part, value in parts.items()}

    def _cores(self, parts: Parts) -> Tensor:
        """s_i H_i of each head, [h, r, r]."""
        H, s = (torch.stack([parts[f"{part}{head}"] for head in range(self.heads)]) for part in "Hs")
        return s[..., None] * H


@functools.lru_cache(maxsize=64)
def _orthonormal(name: str, seed: int, size: int, columns: int) -> Tensor:
    """Random orthonormal columns, [size, columns]. They are shared, and must not be changed."""
    random = sum(2.0**-bit * signs(f"{name}.{bit}", seed, size, columns).double() for bit in range(_BITS))
    q, r = torch.linalg.qr(torch.as_tensor(random))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()
