"""A client optimizer: how one client's parameters move by their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable


class Steps(ABC):
    """One client's optimizer in one round; it holds whatever the method remembers from step to step."""

    def after_pass(self, number: int) -> None:  # noqa: B027 - most take one pass
        """Called after every pass of a step but the last; the parameters have the gradients of the pass.

        Args:
            number: 0 for the step's first pass.
        """

    @abstractmethod
    def step(self, lr: float) -> None:
        """Move the parameters by the gradients that they have, in place.

        Clipping to `train.clip` is the optimizer's own matter, since some clip another quantity than the gradient.
        Penalties (FedProx, pruning) are in the gradients already. The caller lets go of the gradients afterwards.
        """


class ClientOptimizer(ABC):
    """An optimizer by its name: a frozen dataclass whose fields are its options.

    Attributes:
        passes: gradients that one step takes, at the same examples; 2 for sharpness-aware methods.
        elementwise: True if each value's step depends on its own gradients alone, so that clients whose factors lie
            side by side in one tensor may be trained as one batch.
    """

    passes: ClassVar[int] = 1
    elementwise: ClassVar[bool] = False

    def check(self, device: torch.device) -> None:  # noqa: B027 - most run everywhere
        """Raises ConfigError where this device cannot have the optimizer."""

    @abstractmethod
    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        """The optimizer of one client for one round.

        Args:
            trained: what is trained.
            config: `train.lr` is its largest rate, `train.weight-decay` and `train.clip` are for all optimizers.
        """
