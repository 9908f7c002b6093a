"""The base class of statistics. A statistic is what a client measures for the server before round 1."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedlora.adapters import AdapterState
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel

from ..training.trainer import TrainResult


class Statistic(ABC):
    """A measurement on a client. A subclass is a frozen dataclass whose fields are its options, all with defaults."""

    @abstractmethod
    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """The measurement that the client sends back, with the modules and shapes of `asked`.

        Args:
            model: the base model with the head of `asked`, and an adapter that adds nothing; nothing in it is trained.
            asked: the adapter from the broadcast. Its shapes say what is wanted: pairs of factors with the ranks that
                the server wants, or tensors by name.
            examples: the client's own examples.
            config: the run's section train; `train.batch-size` and `train.accumulate` say how many examples one
                optimizer step has.
            seed: seed of this client's order of examples and of dropout.
        """
