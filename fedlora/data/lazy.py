"""Examples that are encoded only when they are first used, since a round uses few of a client's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from fedlora.config import DataConfig

from .examples import Example
from .forms import RowReader, encode_usable, left_out, nothing_to_predict, usable_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class LazyExamples(Sequence[Example]):
    """The same examples as `encode(rows, …)`, each encoded when it is first used.

    An example is encoded once if the task keeps its examples. Otherwise only those of the last `ahead` are kept.

    Attributes:
        rows: the rows of the examples, in their order.
        left_out: a sentence about the rows that have nothing to predict, which do not count; empty if there are none.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader) -> None:
        """Find the rows that have something to predict; there may be none.

        Raises:
            DataError: a column is missing, the task cannot use a value, or a class is out of range.
        """
        idle = nothing_to_predict(rows, tokenizer, data, task)
        self.left_out = left_out(rows, idle, data) if idle else ""
        self.rows = rows.select(usable_of(rows, idle)) if idle else rows
        task.check_rows(self.rows, data)
        self._tokenizer, self._data, self._task = tokenizer, data, task
        self._done: dict[int, Example] = {}

    @property
    def cut(self) -> float:
        """The share of the examples used so far that are longer than `data.max-length`."""
        return sum(bool(example.cut) for example in self._done.values()) / len(self._done) if self._done else 0.0

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example or several.

        Raises:
            DataError: the row cannot be encoded.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        if at not in self._done:
            self.ahead([at])
        return self._done[at]

    def ahead(self, places: Iterable[int]) -> None:
        """Encode those of these examples that are not encoded yet, together, which is faster than one by one.

        Raises:
            DataError: a row cannot be encoded.
        """
        wanted = set(places)
        new = sorted(at for at in wanted if at not in self._done)
        if new and not self._task.keeps_examples:
            self._done = {at: example for at, example in self._done.items() if at in wanted}
        if new:
            rows = self.rows.select(new)
            self._done |= zip(new, encode_usable(rows, self._tokenizer, self._data, self._task), strict=True)
