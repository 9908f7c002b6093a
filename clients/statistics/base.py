"""A statistic: what a client measures for the server before round 1."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedlora.adapters import AdapterState
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel

from ..training.trainer import TrainResult


class Statistic(ABC):
    """A frozen dataclass whose fields are its options, all with defaults."""

    @abstractmethod
    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """What the client sends back, of the modules and shapes that it was asked for.

        Args:
            model: with the adapter that was asked about in place; nothing in it is trained.
            asked: that adapter: its ranks say how many directions of each module are wanted.
            examples: the client's own.
            config: `train.batch-size` and `train.accumulate` say how many examples one step has.
            seed: of this client's order of examples and dropout.
        """
