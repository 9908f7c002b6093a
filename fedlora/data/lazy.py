"""Examples that are encoded when they are first asked for: a round uses few of a client's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from fedlora.config import Config
from fedlora.data.forms import Example, encode_usable, left_out, usable_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class LazyExamples(Sequence[Example]):
    """`encode(rows, …)`, row by row on demand, each row once.

    Attributes:
        left_out: a sentence on the rows that have nothing to predict, and are not counted; empty without any.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        """Find the rows that have something to predict; there may be none.

        Raises:
            DataError: a column is missing, or a value is no text.
        """
        usable = usable_rows(rows, tokenizer, config.data, config.model.task)
        all_are = len(usable) == len(rows)
        self.left_out = "" if all_are else left_out(rows, usable, config.data, config.model.task)
        self._rows = rows if all_are else rows.select(usable)
        self._tokenizer, self._config = tokenizer, config
        self._done: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._rows)

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
            model, row = self._config.model, self._rows.select([at])
            self._done[at] = encode_usable(row, self._tokenizer, self._config.data, model.task, model.labels)[0]
        return self._done[at]
