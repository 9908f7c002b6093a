"""What a task is: everything between rows of data and metrics that depends on what a model learns to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fedlora.common.registry import Option
from fedlora.config import Config, DataConfig, ModelConfig
from fedlora.data import Example

from .scores import Predictions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task(ABC):
    """What a model learns to do. The fields of a subclass, each with a default, are its options.

    Methods are called in this order: of the configuration (`check_config`), of rows (`unusable` to `class_names`), of
    the base model (`auto_class` to `narrowed`), of batches (`collate` to `predict`), of the end (`scores`).
    `unusable`, `check_rows` and `encode` may run before any weights are loaded, and on every client.

    Attributes:
        forms: the values of `data.form` that it can be learned from; with "auto", the first whose columns are there.
        metrics: every name that `scores` gives; "loss" is one of them.
        lower: those of its metrics that are better when they are lower.
        peft_type: `task_type` of PEFT's checkpoints.
        pipeline: the hub's name for what a trained model does, for model cards.
        kind: what transformers' models for it are called, for messages.
    """

    forms: ClassVar[tuple[str, ...]]
    metrics: ClassVar[frozenset[str]]
    lower: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity", "calibration-error"})
    peft_type: ClassVar[str]
    pipeline: ClassVar[str]
    kind: ClassVar[str]

    # Of the configuration.

    @classmethod
    def options_of(cls, model: ModelConfig) -> dict[str, Option]:
        """Fields that other keys of the model section set, such as `model.labels`; none by default."""
        return {}

    def check_config(self, config: Config) -> None:  # noqa: B027 - most tasks need none
        """Raises ConfigError where other keys of a run do not fit; before anything is loaded."""

    # Of rows.

    @property
    def classes(self) -> int:
        """How many classes it tells apart; 0 where it has none."""
        return 0

    @abstractmethod
    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]:
        """By their places, why rows have nothing to predict and are left out, and what is wrong with others.

        Without a tokenizer, a text that is not blank is held to have tokens.

        Raises:
            DataError: a column is missing.
        """

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:  # noqa: B027 - most tasks need none
        """Raises DataError where the values of rows that have something to predict cannot be learned from."""

    @abstractmethod
    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]:
        """An example of each row, and by the places of rows that cannot be one (None), why."""

    def class_names(self, rows: Dataset, data: DataConfig) -> tuple[str, ...]:
        """What the rows call the classes, in the order of their numbers; nothing where they have numbers, or none."""
        return ()

    def learned(self, example: Example) -> Sequence[bool]:
        """Which of an example's tokens the loss is taken of; none by default."""
        return [False] * len(example["input_ids"])

    def answer(self, example: Example, names: Sequence[str]) -> str:
        """What is to be predicted beside the tokens, in words; nothing by default.

        Args:
            example: as `encode` makes it.
            names: as `class_names` gives them.
        """
        return ""

    # Of the base model.

    @abstractmethod
    def auto_class(self) -> Any:
        """transformers' class that reads the base, such as `AutoModelForCausalLM`."""

    def model_options(self) -> dict[str, Any]:
        """What transformers is told beside the folder; nothing by default."""
        return {}

    def check_architecture(self, name: str, settings: PreTrainedConfig) -> None:  # noqa: B027 - most tasks need none
        """Raises ModelError where a model of this config.json cannot serve, before its weights are read."""

    @abstractmethod
    def first_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
        """A few tokens [rows, T] that go through every base when it is loaded, to see whether it can serve."""

    def check_first(self, logits: Tensor, name: str, kind: str) -> None:  # noqa: B027 - most tasks need none
        """Raises ModelError where the logits of `first_tokens` show that the model cannot serve.

        Args:
            logits: fp32, as the model gives them.
            name: `model.name`.
            kind: the model's class.
        """

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - most tasks need none
        """Find out of a model with its adapters in place what `losses` wants to know; nothing by default."""

    def outputs(self, settings: PreTrainedConfig) -> int:
        """How many numbers the model gives for each token, for an estimate of memory; 0 where they are few."""
        return 0

    def narrowed(self, model: nn.Module) -> nn.Module | None:
        """The layer that `losses` and `predict` give a part of the tokens only; None without one."""
        return None

    # Of batches. Each row of a batch is one example.

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Examples as one batch; see `fedlora.data.collate`."""

    @abstractmethod
    def tokens(self, batch: Batch) -> Tensor:
        """How many tokens of each row go through the model, padding left out: int64 [rows]."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """How many losses each row has: int64 [rows]; known without the model."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every loss, fp32 [n], and the row of the batch that it is of, int64 [n]. A step takes the mean of all."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        """What the model says wherever there is something to predict; `rows` counts the batch's, in rising order.

        Args:
            model: with its adapter in place, in eval mode.
            batch: as `collate` makes it.
            adapters: PEFT's name of the adapter of each row, to be passed on as `adapter_names`; the active one for
                all when left out.
        """

    @abstractmethod
    def scores(self, predictions: Predictions) -> dict[str, float]:
        """A number for each of `metrics`, over at least one position."""
