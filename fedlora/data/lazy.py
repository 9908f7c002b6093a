"""Examples that are encoded when they are first asked for: a round uses few of a client's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from fedlora.config import Config
from fedlora.data.forms import Example, encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class LazyExamples(Sequence[Example]):
    """`encode(rows, …)`, row by row on demand, each row once."""

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self._rows, self._tokenizer, self._config = rows, tokenizer, config
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
            self._done[at] = encode(row, self._tokenizer, self._config.data, model.task, model.labels)[0]
        return self._done[at]
