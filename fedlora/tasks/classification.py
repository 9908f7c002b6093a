"""Classification: the model learns to choose one of several classes for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.common.errors import ConfigError
from fedlora.common.registry import Option
from fedlora.config import Config, DataConfig, ModelConfig, label_names
from fedlora.data import Example, class_names, form_of
from fedlora.data.classes import check_classes
from fedlora.data.conversations import text
from fedlora.data.forms import each, too_short

from .base import Batch
from .losses import inputs_of
from .scores import COMMON, Predictions, common, macro_f1
from .text import TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classification(TextTask):
    """Predicting the class of a text with the model's head, which is trained in full.

    Args:
        labels: number of classes; set by `model.labels`.
    """

    forms: ClassVar[tuple[str, ...]] = ("label",)
    metrics: ClassVar[frozenset[str]] = COMMON | {"macro-f1"}
    peft_type: ClassVar[str] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    kind: ClassVar[str] = "classifier of texts"

    labels: int = 2

    @classmethod
    def options_of(cls, model: ModelConfig) -> dict[str, Option]:
        return {"labels": model.labels}

    def check_config(self, config: Config) -> None:
        names = label_names(config.data)
        if names and len(names) != self.labels:
            raise ConfigError(
                f"data.label-names = {config.data.label_names!r} names {len(names)} classes, but model.labels = "
                f"{self.labels}; make them agree"
            )

    @property
    def classes(self) -> int:
        return self.labels

    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]:
        form_of(rows.column_names, data, self)
        column, faults = each(rows, lambda row: "" if row[data.text_column] is None else text(row, data.text_column))
        idle = too_short([words or "" for words in column], tokenizer, least=1)
        blank = [label is None for label in rows[:][data.label_column]] if len(rows) else []
        idle |= {at: "a blank label" for at, none in enumerate(blank) if none and at not in idle}
        return {at: why for at, why in idle.items() if at not in faults}, faults

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:
        check_classes(rows, data, self.labels)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]:
        form_of(rows.column_names, data, self)
        if not len(rows):
            return [], {}
        columns: dict[str, list[Any]] = rows[:]
        examples = []
        whole = tokenizer(columns[data.text_column], verbose=False)["input_ids"]
        for words, ids, label in zip(columns[data.text_column], whole, columns[data.label_column], strict=True):
            fits = len(ids) <= data.max_length
            kept = ids if fits else tokenizer(words, truncation=True, max_length=data.max_length)["input_ids"]
            examples.append(Example({"input_ids": kept, "labels": int(label)}, len(ids), "" if fits else "end"))
        return examples, {}

    def class_names(self, rows: Dataset, data: DataConfig) -> tuple[str, ...]:
        return class_names(rows, data, self.labels)

    def answer(self, example: Example, names: Sequence[str]) -> str:
        label = example["labels"]
        return str(names[label]) if names else str(label)

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": self.labels}

    def first_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
        """A short text with the tokenizer's start and end tokens."""
        return tokenizer(["one text"], return_tensors="pt")["input_ids"]  # pyright: ignore[reportReturnType]

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch["labels"])

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets, rows = self.logits(model, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none"), rows

    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        return Predictions.of_logits(*self.logits(model, batch, adapters))

    def logits(
        self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, classes], targets [rows] and the numbers of the rows [rows]; arguments as in `predict`."""
        inputs = inputs_of(model, batch)
        targets = batch["labels"].to(inputs["input_ids"].device)
        more = {} if adapters is None else {"adapter_names": list(adapters)}
        return model(**inputs, **more).logits, targets, torch.arange(len(targets), device=targets.device)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """The common metrics, and the mean F1 over the classes that occur among targets or predictions."""
        return common(predictions) | {"macro-f1": macro_f1(predictions.predicted, predictions.targets)}
