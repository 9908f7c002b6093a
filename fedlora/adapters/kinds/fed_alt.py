"""FedALT: a client's own LoRA beside the mean of the others', weighed by a gate for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import AdapterError

from ..algebra import uniform
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class FedAlt(AdapterKind):
    """`y = W x + c (w_1 D C x + w_2 B A x)`, `w = softmax(G x)`; A and B are the client's own, C and D the others'.

    Bian et al. 2025, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA",
    https://arxiv.org/abs/2503.11880. Client k trains A [r, d_in], B [d_out, r] and G [2, d_in]. It goes on from its own
    A and B in each round. C [r, d_in] and D [d_out, r] are the means of the other clients' A and B, in which its own
    have no part; they are frozen while it trains. G never leaves the client. At first B, C, D and G are 0, so that
    both weights are 1/2. A is drawn alike for all clients.

    Experimental: the paper is known here from its abstract and notes; where each mixer stands and how it starts are not
    confirmed. Differences: each adapted layer has a gate of its own, on the layer's own input, which has been through
    dropout; the mean over the others is by their rows; a client that has not replied yet has no part in it, and one
    that is not in a round has its latest one. The product of the mean factors is not the mean of the products, which
    is so in the paper too. A client uploads r (d_in + d_out) numbers for a layer. It is sent twice as many, and the
    first G, since the server holds its A and B and sends them back. `lora.alpha` is not used.

    What is added depends on x by more than a product: there is no dW, and no LoRA checkpoint.

    Args:
        scale: c, which is LoRA's alpha / r.
    """

    scale: float = 2.0

    name: ClassVar[str] = "fedalt"
    matrix: ClassVar[bool] = False
    personal: ClassVar[frozenset[str]] = frozenset({"G"})
    others: ClassVar[Mapping[str, str]] = MappingProxyType({"C": "A", "D": "B"})

    def __post_init__(self) -> None:
        check_positive("fedalt", scale=self.scale)

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        down, up = (place.rank, place.d_in), (place.d_out, place.rank)
        return {"A": down, "B": up, "C": down, "D": up, "G": (2, place.d_in)}

    def rank(self, parts: Parts) -> int:
        return len(parts["A"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        return {**{part: torch.zeros(shape) for part, shape in shapes.items()}, "A": uniform(shapes["A"], generator)}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        weights = torch.softmax(F.linear(x, parts["G"]), dim=-1)
        rest = F.linear(x, parts["C"]) * weights[..., :1]
        own = F.linear(x, parts["A"]) * weights[..., 1:]
        return self.scale * (F.linear(rest, parts["D"]) + F.linear(own, parts["B"]))

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        raise AdapterError("fedalt adds no fixed matrix to a layer, and so has no factors B A")
