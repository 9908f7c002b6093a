"""GLAD: the plain gradient, without what speaks against the gradient nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .sam import SharpSteps, check_rho
from .standard import Base


@dataclass(frozen=True)
class Glad(ClientOptimizer):
    """AdamW, or SGD, along the gradient g, without its part against `g_s`, the gradient at `x + rho g / |g|`.

    Peng et al. 2025, "GLAD: Generalizable Tuning for Vision-Language Models", https://arxiv.org/abs/2507.13089. The
    step goes along g if <g, g_s> >= 0, and else along `g - <g, g_s> g_s / |g_s|^2`, over all trained parameters
    together. The result never points against g_s. `train.clip` bounds its norm. The paper trains vision-language
    models; here it serves any task.
    Cost: two forward and two backward passes. State: as SAM's.

    Args:
        rho: distance from the parameters at which g_s is taken.
        base: what steps along the result: adamw or sgd.
    """

    rho: float = 0.05
    base: Base = "adamw"

    passes: ClassVar[int] = 2
    shares_batch: ClassVar[bool] = True
    experimental: ClassVar[str] = (
        "the abstract says that a gradient steers the step towards stable regions; the rule by which the two "
        "gradients are combined here is a guess, not taken from the paper's text or code"
    )

    def __post_init__(self) -> None:
        check_rho("glad", self.rho)

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(self.rho, self.base, trained, config)


class _Steps(SharpSteps):
    def combine(self) -> None:
        found = [
            (one, parameter.grad)
            for one, parameter in zip(self.first, self.parameters, strict=True)
            if one is not None and parameter.grad is not None
        ]
        if not found:
            return
        along = torch.stack([(one * sharp).sum() for one, sharp in found]).sum()
        square = torch.stack([sharp.square().sum() for _, sharp in found]).sum()
        for one, sharp in found:
            sharp.copy_(without_opposition(one, sharp, along, square))


def without_opposition(plain: Tensor, sharp: Tensor, along: Tensor, square: Tensor) -> Tensor:
    """A part of g - min(0, <g, g_s>) g_s / |g_s|^2.

    Args:
        plain, sharp: the same part of g and of g_s.
        along: <g, g_s>.
        square: |g_s|^2.
    """
    return plain - sharp * (along.clamp(max=0.0) / square.clamp(min=torch.finfo(square.dtype).tiny))
