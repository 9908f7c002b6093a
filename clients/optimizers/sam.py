"""SAM: the gradient is taken where the loss is about the largest nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .standard import Base, over


@dataclass(frozen=True)
class Sam(ClientOptimizer):
    """AdamW, or SGD, along the gradient at `x + rho g / |g|`, where g is the gradient at the parameters x.

    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    https://arxiv.org/abs/2010.01412, Algorithm 1; on clients, Qu et al. 2022 (FedSAM), https://arxiv.org/abs/2206.02618.
    All trained parameters are x: the factors (not the product B A), cores and heads. Both passes see the same
    examples, but draw dropout anew. Penalties and privacy stages count in both. `train.clip` bounds the norm of the
    second gradient.
    Cost: two forward and two backward passes. State: the base's, and during a step a copy of the parameters.

    Args:
        rho: distance from the parameters at which the gradient is taken. With 0, it is the base.
        base: what steps along that gradient: adamw or sgd.
    """

    rho: float = 0.05
    base: Base = "adamw"

    passes: ClassVar[int] = 2
    shares_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rho("sam", self.rho)

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return SharpSteps(self.rho, self.base, trained, config)


class SharpSteps(Steps):
    """Goes up along the first gradient, and back before the step.

    Attributes:
        first: the gradients of the first pass; None where a parameter has none.
    """

    def __init__(self, rho: float, base: Base, trained: Trainable, config: TrainConfig) -> None:
        self.parameters, self._rho = trained.parameters, rho
        self.first: list[Tensor | None] = []
        self._before: list[Tensor] = []
        self._base = over(trained.parameters, config, base, clip=config.clip)

    def after_pass(self, number: int) -> None:
        self.first = [parameter.grad for parameter in self.parameters]
        self._before = [parameter.detach().clone() for parameter in self.parameters]
        size = norm(self.first)
        if not size > 0:
            return
        with torch.no_grad():
            for parameter, grad in zip(self.parameters, self.first, strict=True):
                if grad is not None:
                    parameter.add_(grad, alpha=self._rho / size)

    def step(self, lr: float) -> None:
        with torch.no_grad():
            for parameter, before in zip(self.parameters, self._before, strict=True):
                parameter.copy_(before)
            self.combine()
        self.first, self._before = [], []
        self._base.step(lr)

    def combine(self) -> None:
        """Change the second gradients by the first, in place; SAM itself leaves them."""


def norm(grads: list[Tensor | None]) -> float:
    """The common norm of gradients."""
    sizes = [grad.norm() for grad in grads if grad is not None]
    return float(torch.stack(sizes).norm()) if sizes else 0.0


def check_rho(name: str, rho: float) -> None:
    """Raises ConfigError if it is not a radius."""
    if not 0 <= rho < float("inf"):
        raise ConfigError(
            f"train.optimizer-options: {name}'s rho = {rho:g}, expected a number of at least 0, such as 0.05"
        )
