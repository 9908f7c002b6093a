"""Riemannian preconditioning: each factor's gradient is divided by the other factor's Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import Preconditioned, alike, check_fp64, in_fp64, set_gradients, with_gradients
from .standard import Base


@dataclass(frozen=True)
class Riemannian(ClientOptimizer):
    """AdamW, or SGD, on scaled gradients: `(B'B + d I)^-1 G_A` and `G_B (A A' + d I)^-1`.

    Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
    https://arxiv.org/abs/2402.02347, Algorithms 1 (scaled GD) and 2 (scaled AdamW). With `base=sgd` and a small
    `delta`, a step of B A is the same for A, B and S A, B S^-1, with any invertible S. AdamW's moments, taken entry by
    entry, lose this.

    Differences: the gradients of the factors contain the module's scaling s, as autograd gives them; the paper has no
    s. `train.clip` bounds the common norm of all gradients before they are scaled.
    Cost: per pair two Gram matrices and two solves, O(d r^2). State: the base's.

    Args:
        base: what steps along the scaled gradients: adamw or sgd.
        delta: the d above, which keeps the inverse finite while B = 0.
    """

    base: Base = "adamw"
    delta: float = 1e-6

    shares_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise ConfigError(
                f"train.optimizer-options: riemannian's delta = {self.delta:g}, expected a number above 0"
            )

    def check(self, device: torch.device) -> None:
        check_fp64("riemannian", device)

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(self, trained, config)


class _Steps(Preconditioned):
    def __init__(self, options: Riemannian, trained: Trainable, config: TrainConfig) -> None:
        super().__init__(trained, config, options.base)
        self._delta = options.delta

    def change(self) -> None:
        self.clip_all()
        for pairs in alike(with_gradients(self.pairs)):
            A, B, grad_a, grad_b = in_fp64(pairs)
            better_b = _scaled(A @ A.mT, grad_b.mT, self._delta).mT
            set_gradients(pairs, _scaled(B.mT @ B, grad_a, self._delta), better_b)


def _scaled(gram: Tensor, grad: Tensor, delta: float) -> Tensor:
    """(gram + delta I)^-1 @ grad; in fp32 a small delta would vanish beside gram."""
    return torch.linalg.solve(gram + delta * torch.eye(gram.shape[-1]).to(gram), grad)
