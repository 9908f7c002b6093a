"""Ranks in proportion to the norm of the gradient by each module's weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import norm, stack
from fedlora.exchange import ClientUpdate

from ..tools.replies import gather
from .proportional import Proportional


@dataclass(frozen=True)
class Dynamic(Proportional):
    """Ranks in proportion to `|sum_k p_k G_k|_F`, where G_k is the gradient of client k's loss by the weight.

    Experimental: Liao et al. 2025, "Dynamic Adaptation of LoRA Fine-Tuning for Efficient and Task-Specific Optimization
    of Large Language Models", https://arxiv.org/abs/2501.14859, is known here from its abstract: it weighs layers by
    their importance and the features of the inputs. How, is not confirmed. Here the importance is the norm of the mean
    gradient at the base model, over the r leading directions that clients send in a round 0, and it decides ranks
    instead of a strength.

    Args:
        growth: largest rank of a module, as a multiple of the client's own.
    """

    statistic: ClassVar[str] = "gradient"

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Module -> the norm of its mean gradient."""
        found, _ = gather(replies, 0)
        return {name: torch.tensor([norm(stack(part.factors, part.shares))]) for name, part in found.items()}
