"""Examples as the model sees them, as text to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from fedlora.config import DataConfig

from .forms import RowReader, encode_usable, usable_rows
from .partition import Split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shown:
    """One row as the model sees it.

    Args:
        row: number of the row in the source, from 1.
        tokens: number of tokens that the model sees; 0 for a row that is left out, as it has nothing to predict.
        whole: number of tokens before the row was cut to `data.max-length`.
        parts: pieces of the text, with special tokens, each with whether it is in the loss.
        label: for classification, name or number of the class; else empty.
        picture: of an image, its pixels in RGB, uint8 [height, width, 3]; `tokens` is their number.
    """

    row: int
    tokens: int = 0
    whole: int = 0
    parts: tuple[tuple[str, bool], ...] = ()
    label: str = ""
    picture: np.ndarray | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


def first_examples(
    rows: Dataset, count: int, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader
) -> list[Shown]:
    """The first rows of a source, as the model sees them.

    Args:
        rows: the rows of the source, in its order.
        count: largest number of rows to show.
        tokenizer: the model's tokenizer.
        data: the run's section data.
        task: the run's task.

    Raises:
        DataError: as in `encode`.
    """
    rows = rows.select(range(min(count, len(rows))))
    usable = usable_rows(rows, tokenizer, data, task)
    chosen = rows.select(usable)
    found = {row: Shown(row) for row in range(1, len(rows) + 1)}
    task.check_rows(chosen, data)
    names = task.class_names(chosen, data)
    for row, example in zip(usable, encode_usable(chosen, tokenizer, data, task), strict=True):
        label, picture = task.answer(example, names), task.picture(example)
        if picture is not None:
            found[row + 1] = Shown(row + 1, example.whole, example.whole, label=label, picture=picture)
            continue
        ids: list[int] = example["input_ids"]
        parts = _parts(ids, task.learned(example), tokenizer)
        found[row + 1] = Shown(row + 1, len(ids), example.whole, parts, label)
    return list(found.values())


def client_examples(
    split: Split, client: int, count: int, *, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader
) -> list[Shown]:
    """The first rows of a client, as the model sees them, each with its number in the source.

    Args:
        split: the run's split.
        client: number of the client.
        count, tokenizer, data, task: as in `first_examples`.

    Raises:
        DataError: as in `encode`.
    """
    part = split.parts[client]
    found = first_examples(split.client(client), count, tokenizer, data, task)
    return [replace(one, row=int(part[one.row - 1]) + 1) for one in found]


def _parts(ids: list[int], learned: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """The text in pieces that are learned or not. Each is decoded with all before it, on which its spaces depend."""
    parts: list[tuple[str, bool]] = []
    done, end = "", 0
    for flag, run in groupby(learned):
        end += len(list(run))
        upto = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        parts.append((upto[len(done) :], flag))
        done = upto
    return tuple(parts)
