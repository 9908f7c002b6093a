"""The base classes of client optimizers, which change a client's parameters by their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable


class Steps(ABC):
    """One client's optimizer in one round, with all state that the method keeps from step to step."""

    def after_pass(self, number: int) -> None:  # noqa: B027 - most take one pass
        """Called after each pass of a step except the last, when the parameters have the gradients of that pass.

        The gradients contain what `step` gets: privacy stages and penalties are applied in every pass.

        Args:
            number: number of the pass within the step, from 0.
        """

    @abstractmethod
    def step(self, lr: float) -> None:
        """Change the parameters in place, by the gradients that they have.

        The optimizer must itself clip to `train.clip`, since some optimizers clip another quantity than the gradient.
        The gradients already contain penalties (FedProx, pruning). The caller clears the gradients afterwards.

        Args:
            lr: the learning rate of this step.
        """


class ClientOptimizer(ABC):
    """A client optimizer. A subclass is a frozen dataclass whose fields are its options.

    Attributes:
        passes: number of gradients per step, all on the same examples; 2 for sharpness-aware methods.
        shares_batch: True if the steps of one client read and change, in place, the parameters and gradients that
            `begin` was given, and nothing else. Several clients can then be trained as one batch: each has its own
            steps, over parameters that are strided views of the tensors of all clients.
        experimental: one sentence that says what about the method is not confirmed; empty for most.
    """

    passes: ClassVar[int] = 1
    shares_batch: ClassVar[bool] = False
    experimental: ClassVar[str] = ""

    def check(self, device: torch.device) -> None:  # noqa: B027 - most run everywhere
        """Check that the optimizer works on this device.

        Raises:
            ConfigError: it does not.
        """

    @abstractmethod
    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        """The optimizer of one client for one round.

        Args:
            trained: the client's trained parameters.
            config: the run's section train; of it, `train.lr` (the highest rate), `train.weight-decay` and
                `train.clip` are for all optimizers.
        """
