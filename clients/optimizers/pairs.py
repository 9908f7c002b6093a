"""What optimizers of pairs have in common: they see a module's A and B together.

They step the *whole* pairs, whose factors are both trained and have no core between them. All else that is trained (a
factor whose partner is frozen, cores, heads, parts of other kinds of adapters) is stepped by torch's optimizer.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.common.errors import ConfigError
from fedlora.common.once import say_once
from fedlora.config import TrainConfig
from fedlora.models.trainable import Pair, Trainable

from .base import Steps
from .standard import Base, over

_NO_PAIRS = (
    "train.optimizer = %s changes steps of factors A and B that are trained together, and here are none: all "
    "parameters take the steps of the optimizer below it, AdamW by default"
)


def whole_pairs(trained: Trainable, config: TrainConfig) -> list[Pair]:
    """The whole pairs; if there are none, the log says once that the optimizer is only its base."""
    if not trained.whole:
        say_once(logging.WARNING, _NO_PAIRS, config.optimizer)
    return trained.whole


def with_gradients(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that took part in the present batch; a layer that was not called gets no gradients."""
    return [pair for pair in pairs if pair.A.grad is not None and pair.B.grad is not None]


def alike(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in groups of equal shapes, to be computed together: small decompositions cost mostly their calls."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.A.shape, pair.B.shape, pair.A.device), []).append(pair)
    return [*groups.values()]


def gradients(pair: Pair) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, to be changed in place.

    In a batch of clients they are strided views like the parameters, and torch's fused optimizers read both by memory
    order: a gradient of another layout in their place would be permuted silently.
    """
    assert pair.A.grad is not None
    assert pair.B.grad is not None
    return pair.A.grad, pair.B.grad


def in_fp64(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [n, r, d_in] and B [n, d_out, r] of n pairs of equal shapes, and the gradients of both."""
    each = [(pair.A, pair.B, *gradients(pair)) for pair in pairs]
    A, B, grad_a, grad_b = (torch.stack(tensors).double() for tensors in zip(*each, strict=True))
    return A, B, grad_a, grad_b


def set_gradients(pairs: Sequence[Pair], of_a: Tensor, of_b: Tensor) -> None:
    """Give the pairs these gradients, [n, r, d_in] and [n, d_out, r], in place."""
    for pair, *values in zip(pairs, of_a, of_b, strict=True):
        for grad, value in zip(gradients(pair), values, strict=True):
            grad.copy_(value)


def check_fp64(name: str, device: torch.device) -> None:
    """Raises ConfigError on a device that does not compute in fp64."""
    if device.type == "mps":
        raise ConfigError(
            f"train.optimizer = {name!r} computes in fp64, which {device} cannot; use another optimizer, or "
            "model.device = cpu"
        )


def scale_to(size: float | Tensor, clip: float) -> float:
    """The factor that brings a size down to `clip`, as torch's `clip_grad_norm_` computes it; 1 without a limit."""
    return min(1.0, clip / (float(size) + 1e-6)) if clip else 1.0


class Preconditioned(Steps):
    """Changes the gradients of the whole pairs, and then steps everything by AdamW or SGD."""

    def __init__(self, trained: Trainable, config: TrainConfig, base: Base) -> None:
        self.pairs, self.others, self.clip = whole_pairs(trained, config), trained.beside, config.clip
        self._parameters = trained.parameters
        self._base = over(trained.parameters, config, base, clip=0.0)

    def step(self, lr: float) -> None:
        with torch.no_grad():
            self.change()
        self._base.step(lr)

    @abstractmethod
    def change(self) -> None:
        """Clip, and change the pairs' gradients in place."""

    def clip_all(self) -> None:
        """Clip the gradients of all parameters by their common norm, as AdamW does."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
