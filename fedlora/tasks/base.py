"""The base class of tasks. A task has everything from rows to metrics that depends on what a model learns to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fedlora.common.registry import Option
from fedlora.config import Config, DataConfig, ModelConfig
from fedlora.data import Example

from .scores import Predictions
from .tokenizers import read_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task(ABC):
    """What a model learns to do. The fields of a subclass, each with a default, are its options.

    Methods are called in this order: those on the configuration (`check_config`), on rows (`unusable` to
    `class_names`), on the base model (`auto_class` to `narrowed`), on batches (`collate` to `predict`), and `scores` at
    the end. `unusable`, `check_rows` and `encode` may run before any weights are loaded, and on every client.

    Attributes:
        forms: the values of `data.form` from which the task can be learned. If `data.form` is "auto", the first form
            whose columns the rows have is taken.
        metrics: all names that `scores` returns; "loss" must be one of them.
        lower: the metrics that are better when they are lower.
        peft_type: the `task_type` in PEFT checkpoints; None for a task that PEFT has no class for.
        pipeline: the hub's name for the use of a trained model, for model cards.
        kind: name for a model of this task, such as "causal language model", for messages.
        processor: name for what `read_processor` reads, for messages. Other methods call it the tokenizer.
        unit: what `tokens` counts, for messages.
        keeps_examples: whether a client's examples are kept from round to round; if they are large, only a round's are.
    """

    forms: ClassVar[tuple[str, ...]]
    metrics: ClassVar[frozenset[str]]
    lower: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity", "calibration-error"})
    peft_type: ClassVar[str | None]
    pipeline: ClassVar[str]
    kind: ClassVar[str]
    processor: ClassVar[str] = "tokenizer"
    unit: ClassVar[str] = "tokens"
    keeps_examples: ClassVar[bool] = True

    # Methods on the configuration.

    @classmethod
    def options_of(cls, model: ModelConfig) -> dict[str, Option]:
        """The options that other keys of the section model set, such as `model.labels`; none by default."""
        return {}

    def check_config(self, config: Config) -> None:  # noqa: B027 - most tasks need none
        """Check, before anything is loaded, that the other keys of a run fit this task.

        Raises:
            ConfigError: a key does not fit.
        """

    # Methods on rows.

    @property
    def classes(self) -> int:
        """The number of classes; 0 for a task without classes."""
        return 0

    @abstractmethod
    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]:
        """The rows that cannot be used, in two groups, each as number of the row -> reason.

        Args:
            rows: the rows to look at.
            tokenizer: the model's tokenizer; None: every text that is not blank is assumed to have tokens.
            data: the run's section data.

        Returns:
            The rows that have nothing to predict and are left out, and the rows that are faulty.

        Raises:
            DataError: a column is missing.
        """

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:  # noqa: B027 - most tasks need none
        """Check the values of rows that have something to predict.

        Raises:
            DataError: the task cannot be learned from these values.
        """

    @abstractmethod
    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]:
        """An example for each row (None if a row cannot be encoded), and number of the row -> reason for the latter."""

    def class_names(self, rows: Dataset, data: DataConfig) -> tuple[str, ...]:
        """The names that the rows give the classes, in the order of their numbers; empty if they have no names."""
        return ()

    def learned(self, example: Example) -> Sequence[bool]:
        """For each token of an example, whether it is in the loss; none by default."""
        return [False] * len(example["input_ids"])

    def answer(self, example: Example, names: Sequence[str]) -> str:
        """The part of an example's target that is not among its tokens, such as its class, in words; empty by default.

        Args:
            example: an example that `encode` made.
            names: the names of the classes, from `class_names`.
        """
        return ""

    def picture(self, example: Example) -> np.ndarray | None:
        """An example's image as the model sees it, in RGB, uint8 [height, width, 3]; None for other examples."""
        return None

    # Methods on the base model.

    def read_processor(self, folder: Path) -> Any:
        """The tokenizer in a model's folder, or what else turns rows into the model's inputs."""
        return read_tokenizer(folder)

    @abstractmethod
    def auto_class(self) -> Any:
        """The class of transformers that loads the base model, such as `AutoModelForCausalLM`."""

    def model_options(self) -> dict[str, Any]:
        """Further arguments for loading the base model with transformers; none by default."""
        return {}

    def check_architecture(self, name: str, settings: PreTrainedConfig) -> None:  # noqa: B027 - most tasks need none
        """Check, before weights are read, that a model with this config.json fits the task.

        Args:
            name: `model.name`, for messages.
            settings: the model's config.json.

        Raises:
            ModelError: the model does not fit.
        """

    def unquantized(self) -> tuple[str, ...]:
        """The names of modules that stay in full precision on a quantized base, where the model has them."""
        return ()

    @abstractmethod
    def first_inputs(self, tokenizer: Any, vocabulary: int) -> Batch:
        """A few inputs with which every base model is called when it is loaded.

        Args:
            tokenizer: the model's tokenizer.
            vocabulary: number of the model's tokens; 0 for a model that has none.
        """

    def first_logits(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The model's logits for `first_inputs`.

        Args:
            model: the base model.
            inputs: the inputs, on the model's device.

        Raises:
            ModelError: the model does not fit the task.
        """
        return model(**inputs).logits

    def check_first(self, logits: Tensor, name: str, kind: str) -> None:  # noqa: B027 - most tasks need none
        """Check the model's logits for `first_inputs`.

        Args:
            logits: the model's logits, in fp32.
            name: `model.name`, for messages.
            kind: name of the model's class, for messages.

        Raises:
            ModelError: the logits show that the model does not fit the task.
        """

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - most tasks need none
        """Find out what `losses` has to know about a model that has adapters; nothing by default."""

    def outputs(self, settings: PreTrainedConfig) -> int:
        """The number of outputs for each token, for an estimate of memory; 0 if there are few."""
        return 0

    def narrowed(self, model: nn.Module) -> nn.Module | None:
        """The layer that `losses` and `predict` run on some of the tokens only; None if there is none."""
        return None

    # Methods on batches. Each row of a batch is one example.

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """The examples as one batch; see `fedlora.data.collate`.

        Args:
            examples: the examples, one for each row of the batch.
            pad_id: token that fills up shorter rows on the right.
        """

    def augmented(self, examples: Sequence[Example], names: str, seed: int) -> Sequence[Example]:
        """The examples of a training step, changed at random as `train.augment` says; unchanged by default.

        Args:
            examples: one client's examples.
            names: `train.augment`; it is empty unless the task reads images.
            seed: the same seed gives the same changes.
        """
        return examples

    @abstractmethod
    def tokens(self, batch: Batch) -> Tensor:
        """The number of tokens of each row without padding, int64 [rows]."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """The number of losses of each row, int64 [rows]; it must not depend on the model."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """All losses of a batch; an optimizer step uses their mean.

        Returns:
            The losses, fp32 [n], and for each of them the number of its row in the batch, int64 [n].
        """

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        """The model's predictions at all positions of a batch that have a target.

        Args:
            model: the model with its adapter, in eval mode.
            batch: a batch that `collate` made.
            adapters: PEFT's name of each row's adapter, to be passed to the model as `adapter_names`; the active
                adapter for all rows when left out.

        Returns:
            The predictions; their `rows` are the rows of the batch, in ascending order.
        """

    @abstractmethod
    def scores(self, predictions: Predictions) -> dict[str, float]:
        """A number for each of `metrics`, computed from at least one position."""
