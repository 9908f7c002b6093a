"""Classification: the model learns to choose one of several classes for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fedlora.config import DataConfig
from fedlora.data import Example, form_of
from fedlora.data.conversations import text
from fedlora.data.forms import each, too_short

from .base import Batch
from .by_class import ByClass
from .losses import inputs_of
from .text import TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classification(ByClass, TextTask):
    """Predicting the class of a text with the model's head, which is trained in full."""

    forms: ClassVar[tuple[str, ...]] = ("label",)
    peft_type: ClassVar[str] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    kind: ClassVar[str] = "classifier of texts"

    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]:
        form_of(rows.column_names, data, self)
        column, faults = each(rows, lambda row: "" if row[data.text_column] is None else text(row, data.text_column))
        idle = too_short([words or "" for words in column], tokenizer, least=1)
        blank = [label is None for label in rows[:][data.label_column]] if len(rows) else []
        idle |= {at: "a blank label" for at, none in enumerate(blank) if none and at not in idle}
        return {at: why for at, why in idle.items() if at not in faults}, faults

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

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def first_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
        """A short text with the tokenizer's start and end tokens."""
        return tokenizer(["one text"], return_tensors="pt")["input_ids"]  # pyright: ignore[reportReturnType]

    def inputs(self, model: nn.Module, batch: Batch) -> Batch:
        return inputs_of(model, batch)
