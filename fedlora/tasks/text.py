"""The base class of tasks on texts, whose examples have tokens and labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora.data import Example, collate

from .base import Batch, Task
from .losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextTask(Task):
    """A task whose examples have `input_ids`, at most `data.max-length` tokens, and `labels`.

    A batch has `input_ids` and `attention_mask` [rows, T], and `labels`, which are [rows, T] with -100 at positions
    without a label, or [rows]; all int64. The pad token may be the end token, since the mask is made from positions.
    """

    @abstractmethod
    def first_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
        """A few tokens [rows, T] for `first_inputs`; arguments as there."""

    def first_inputs(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Batch:
        ids = self.first_tokens(tokenizer, vocabulary)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        batch = collate(examples, {"input_ids": pad_id, "labels": IGNORED})
        mask = torch.zeros_like(batch["input_ids"])
        for row, example in zip(mask, examples, strict=True):
            row[: len(example["input_ids"])] = 1
        return {"input_ids": batch.pop("input_ids"), "attention_mask": mask, **batch}

    def tokens(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(dim=1)
