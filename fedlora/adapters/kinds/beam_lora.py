"""BeamLoRA: a trained gate for each rank; the server lets weak ranks go and strong ones grow after each round."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
class BeamLora(AdapterKind):
    """`dW = c B diag(s) A` with gates `s = r softmax(g / tau)`, where A, B and g [r] are trained, g from zero.

    Gu et al. 2025, "BeamLoRA: Beam-Constraint Low-Rank Adaptation", https://arxiv.org/abs/2502.13604. After each round
    the gates of all modules are sorted together. Ranks behind the share `p` of their sum are pruned, with p going from
    `p_first` to 1 over the run on a cosine. Their places take the A and B that the strongest ranks of their module had
    a round before, and both get the mean of their two gates. Differences from the paper: this happens on the server
    between rounds, and not every some thousand steps on one machine, and the optimizer's moments start anew with each
    round. With g = 0 it is LoRA of scaling c. The mean of the parts is not the mean of the updates. A client uploads
    r (d_in + d_out + 1) numbers for a layer.

    Args:
        tau: temperature of the gates; 0.05 as in the paper.
        p_first: share of the gates' sum that is kept after round 1, above 0 and at most 1; 0.95 as in the paper.
        scale: c, which is LoRA's alpha / r; `lora.alpha` is not used.
    """

    tau: float = 0.05
    p_first: float = 0.95
    scale: float = 2.0

    name: ClassVar[str] = "beamlora"

    def __post_init__(self) -> None:
        check_positive("beamlora", tau=self.tau, scale=self.scale)
        if not 0 < self.p_first <= 1:
            raise ConfigError(f"lora.kind-options: beamlora's p_first = {self.p_first}, expected above 0 and at most 1")

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {"A": (place.rank, place.d_in), "B": (place.d_out, place.rank), "g": (place.rank,)}

    def rank(self, parts: Parts) -> int:
        return len(parts["g"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        return {"A": uniform(shapes["A"], generator), "B": torch.zeros(shapes["B"]), "g": torch.zeros(shapes["g"])}

    def gates(self, g: Tensor) -> Tensor:
        """The strength of each rank; their mean is 1."""
        return len(g) * (g / self.tau).softmax(dim=0)

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return self.scale * F.linear(F.linear(x, parts["A"]) * self.gates(parts["g"]), parts["B"])

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        return LoraFactors(A=self.gates(parts["g"])[:, None] * parts["A"], B=parts["B"], scaling=self.scale)

    def after_round(self, before: Sequence[Parts], after: Sequence[Parts], share: float) -> Sequence[Parts]:
        """Prune and grow the ranks of all modules; nothing after the last round, where p is 1."""
        p = 1 - (1 - self.p_first) * (1 + math.cos(math.pi * share)) / 2
        if p >= 1:
            return after
        pruned = _tail([self.gates(parts["g"].double()) for parts in after], p)
        return [self._grown(old, new, weak) for old, new, weak in zip(before, after, pruned, strict=True)]

    def _grown(self, before: Parts, after: Parts, weak: Sequence[int]) -> dict[str, Tensor]:
        """The module's parts with its weak ranks replaced by what its strongest were a round before."""
        strong = [int(i) for i in after["g"].argsort(descending=True, stable=True) if int(i) not in weak]
        parts = {name: value.clone() for name, value in after.items()}
        for place, rank in enumerate(weak):
            if not strong:
                break
            model = strong[place % len(strong)]
            parts["A"][rank], parts["B"][:, rank] = before["A"][model], before["B"][:, model]
            mean = (parts["g"][rank] + parts["g"][model]) / 2
            parts["g"][rank] = parts["g"][model] = mean
        return parts


def _tail(gates: Sequence[Tensor], p: float) -> list[list[int]]:
    """For each module, the ranks behind the share p of the sum of all gates, which are sorted together."""
    flat = torch.cat(list(gates))
    order = flat.argsort(descending=True, stable=True)
    reached = flat[order].cumsum(dim=0) / flat.sum()
    kept = int((reached < p - 1e-9).sum()) + 1
    weak = torch.ones(len(flat), dtype=torch.bool)
    weak[order[:kept]] = False
    return [part.nonzero().flatten().tolist() for part in weak.split([len(gate) for gate in gates])]
