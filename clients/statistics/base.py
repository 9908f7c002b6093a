"""The base class of statistics. A statistic is what a client measures for the server before round 1."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedlora.adapters import AdapterState
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel

from ..training.private import RowPrivacy
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

    def measure_with_noise(
        self,
        model: AdaptedModel,
        asked: AdapterState,
        examples: LazyExamples,
        config: TrainConfig,
        *,
        privacy: RowPrivacy,
        releases: int,
    ) -> tuple[AdapterState, TrainResult]:
        """As `measure`, but computed from noised sums over rows; only the statistics of `WITH_NOISE` can.

        Args:
            model, asked, examples, config: as in `measure`.
            privacy: how rows are drawn, clipped and noised.
            releases: number of noised sums that may be released: as many as in a round of training.

        Raises:
            ConfigError: this statistic has no noise.
        """
        raise ConfigError(
            f"{type(self).__name__}: this statistic of a client's rows has no noise; set lora.init = uniform and "
            "lora.allocation = pattern"
        )
