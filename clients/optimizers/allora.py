"""ALLoRA: rows of the factors learn the faster, the smaller they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import Preconditioned, gradients, with_gradients


@dataclass(frozen=True)
class Allora(ClientOptimizer):
    """AdamW, with each row of A and of B multiplied by `1 / sqrt(|row| + 1 / eta^2)`, which is `eta` at a row of zeros.

    Huang and Balestriero 2024, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    https://arxiv.org/abs/2410.09692. The method is LoRA without dropout and without a scaling: set `lora.dropout = 0`,
    and `lora.alpha = 1r`, which makes the scaling 1. Neither is changed here.

    What is multiplied is the gradient. AdamW divides a gradient by its own size, so that a factor that stays as it was
    cancels out, and only its change from step to step is left. With `scale=step` the change that AdamW makes is
    multiplied instead, so that the factor is a rate for each row. `train.clip` bounds the common norm of all gradients
    before they are multiplied.
    Cost: the norms of the rows. State: AdamW's.

    Args:
        eta: the factor of a row of zeros.
        scale: what the factor multiplies: gradient, or step.
    """

    eta: float = 2.0
    scale: Literal["gradient", "step"] = "gradient"

    shares_batch: ClassVar[bool] = True
    experimental: ClassVar[str] = (
        "the abstract speaks of gradients per sample and per parameter; the form by rows, the value of eta and whether "
        "AdamW comes after the factor are from notes on the paper, not from its text or code"
    )

    def __post_init__(self) -> None:
        if not 0 < self.eta < float("inf"):
            raise ConfigError(
                f"train.optimizer-options: allora's eta = {self.eta:g}, expected a number above 0, such as 2"
            )

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(self, trained, config)


class _Steps(Preconditioned):
    def __init__(self, options: Allora, trained: Trainable, config: TrainConfig) -> None:
        super().__init__(trained, config, "adamw")
        self._options = options

    def step(self, lr: float) -> None:
        if self._options.scale == "gradient":
            super().step(lr)
            return
        rows = [rows for pair in with_gradients(self.pairs) for rows in (pair.A, pair.B)]
        before = [factor.detach().clone() for factor in rows]
        super().step(lr)
        with torch.no_grad():
            for factor, start in zip(rows, before, strict=True):
                factor.copy_(torch.lerp(start, factor, row_factors(start, self._options.eta)))

    def change(self) -> None:
        self.clip_all()
        if self._options.scale == "step":
            return
        for pair in with_gradients(self.pairs):
            for factor, grad in zip((pair.A, pair.B), gradients(pair), strict=True):
                grad.mul_(row_factors(factor, self._options.eta))


def row_factors(factor: Tensor, eta: float) -> Tensor:
    """What each row is multiplied by, as a column."""
    return (factor.norm(dim=1, keepdim=True) + 1 / eta**2).rsqrt()
