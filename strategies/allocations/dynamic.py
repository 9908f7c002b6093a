"""Ranks in proportion to the norm of the gradient by each module's weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import norm, stack
from fedlora.exchange import ClientInfo, ClientUpdate

from ..tools.replies import gather
from .base import Allocation, Learned, Shapes
from .budget import check_growth, most_worth


@dataclass(frozen=True)
class Dynamic(Allocation):
    """Ranks in proportion to `|sum_k p_k G_k|_F`, where G_k is the gradient of client k's loss by the weight.

    Experimental: Liao et al. 2025, "Dynamic Adaptation of LoRA Fine-Tuning for Efficient and Task-Specific Optimization
    of Large Language Models", https://arxiv.org/abs/2501.14859, is known here from its abstract: it weighs layers by
    their importance and the features of the inputs. How, is not confirmed. Here the importance is the norm of the mean
    gradient at the base model, over the r leading directions that clients send in a round 0, and it decides ranks
    instead of a strength. Every module has at least rank 1. Equal norms give equal ranks.

    Args:
        growth: largest rank of a module, as a multiple of the client's own.
    """

    growth: float = 2.0

    statistic: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        check_growth("dynamic", self.growth)

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Module -> the norm of its mean gradient."""
        found, _ = gather(replies, 0)
        return {name: torch.tensor([norm(stack(part.factors, part.shares))]) for name, part in found.items()}

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """In proportion to the norms, as far as the client's budget goes."""
        scores = {module: float(score) for module, score in learned.items()}
        return most_worth(client, shapes, lambda module, rank: scores.get(module, 0.0) / (rank + 1), self.growth)
