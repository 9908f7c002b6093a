"""The base class of tasks in which each example has one of several classes, predicted by a head or a readout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.common.errors import ConfigError
from fedlora.common.registry import Option
from fedlora.config import Config, DataConfig, ModelConfig, label_names
from fedlora.data import Example, class_names
from fedlora.data.classes import check_classes

from .base import Batch, Task
from .scores import COMMON, Predictions, common, macro_f1

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ByClass(Task):
    """Predicting the class of an example, whose number is its array `labels`, from logits.

    Args:
        labels: number of classes; set by `model.labels`.
    """

    metrics: ClassVar[frozenset[str]] = COMMON | {"macro-f1"}

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

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:
        check_classes(rows, data, self.labels)

    def class_names(self, rows: Dataset, data: DataConfig) -> tuple[str, ...]:
        return class_names(rows, data, self.labels)

    def answer(self, example: Example, names: Sequence[str]) -> str:
        label = example["labels"]
        return str(names[label]) if names else str(label)

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": self.labels}

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch["labels"])

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets, rows = self.logits(model, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none"), rows

    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        return Predictions.of_logits(*self.logits(model, batch, adapters))

    @abstractmethod
    def inputs(self, model: nn.Module, batch: Batch) -> Batch:
        """What the model is called with, on its device."""

    def logits(
        self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, classes], targets [rows] and the numbers of the rows [rows]; arguments as in `predict`."""
        inputs = self.inputs(model, batch)
        targets = batch["labels"].to(next(iter(inputs.values())).device)
        more = {} if adapters is None else {"adapter_names": list(adapters)}
        return model(**inputs, **more).logits, targets, torch.arange(len(targets), device=targets.device)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """The common metrics, and the mean F1 over the classes that occur among targets or predictions."""
        return common(predictions) | {"macro-f1": macro_f1(predictions.predicted, predictions.targets)}
