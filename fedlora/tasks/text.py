"""What tasks on texts have in common: tokens, their mask, and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.data import Example, collate

from .base import Batch, Task
from .losses import IGNORED


@dataclass(frozen=True)
class TextTask(Task):
    """A task whose examples have `input_ids`, tokens of at most `data.max-length`, and `labels`.

    A batch has `input_ids` and `attention_mask` [rows, T], and `labels`: [rows, T] with -100 where there are none, or
    [rows]; all int64. The pad token may be the end token, since the mask goes by position.
    """

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        batch = collate(examples, {"input_ids": pad_id, "labels": IGNORED})
        mask = torch.zeros_like(batch["input_ids"])
        for row, example in zip(mask, examples, strict=True):
            row[: len(example["input_ids"])] = 1
        return {"input_ids": batch.pop("input_ids"), "attention_mask": mask, **batch}

    def tokens(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(dim=1)
