"""From rows to examples: the form of the rows, which rows can be used, and messages about the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

from .conversations import RowError, conversation
from .examples import Example
from .places import places

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ENOUGH = 256  # so many characters are more than one token, except for words that a vocabulary lacks
_Read = TypeVar("_Read")
_log = logging.getLogger("fedlora")


class RowReader(Protocol):
    """The methods of `fedlora.tasks.base.Task` that read rows, explained there; data/ does not import tasks/."""

    forms: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    keeps_examples: ClassVar[bool]

    @property
    def classes(self) -> int: ...

    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]: ...

    def check_rows(self, rows: Dataset, data: DataConfig) -> None: ...

    def class_names(self, rows: Dataset, data: DataConfig) -> tuple[str, ...]: ...

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]: ...

    def learned(self, example: Example) -> Sequence[bool]: ...

    def answer(self, example: Example, names: Sequence[str]) -> str: ...

    def picture(self, example: Example) -> np.ndarray | None: ...


def form_of(columns: Sequence[str], data: DataConfig, task: RowReader) -> str:
    """The form of the rows: "prompt", "chat", "alpaca", "sharegpt", "text", "label" or "image".

    Args:
        columns: names of the rows' columns.
        data: the section data, with `form` and the names of columns. With form "auto", the first of the task's forms
            whose columns are there is taken.
        task: names the forms from which it can be learned.

    Raises:
        DataError: a column is missing (the message lists those that exist), or the form does not fit the task.
    """
    wanted = {name: column_names(name, data) for name in task.forms}
    form = data.form
    if form == "auto":
        found = [name for name, names in wanted.items() if set(names) <= set(columns)]
        form = next(iter(found), task.forms[0] if len(task.forms) == 1 else "")
    if not form:
        raise DataError(
            f"{data.source}: the form of its rows cannot be told from the columns {_list(columns)}; expected "
            f"{' or '.join(_list(names) for names in wanted.values())}; name yours with data.prompt-column, "
            f"data.response-column, data.messages-column or data.text-column"
        )
    if form not in task.forms:
        raise DataError(
            f"{data.source}: data.form = {form!r} does not fit model.task, which takes the form "
            f"{' or '.join(map(repr, task.forms))}; choose one of these, or another model.task"
        )
    for name in column_names(form, data):
        if name not in columns:
            raise DataError(
                f"{data.source}: no column {name!r}, which data.form = {form!r} needs; the columns are "
                f"{_list(columns)}; name the right one in the data section"
            )
    return form


def column_names(form: str, data: DataConfig) -> tuple[str, ...]:
    """The columns that a form reads."""
    return columns_by_form(data)[form]


def columns_by_form(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """Every form, and the columns that it reads."""
    return {
        "prompt": (data.prompt_column, data.response_column),
        "chat": (data.messages_column,),
        "alpaca": ("instruction", "output"),
        "sharegpt": ("conversations",),
        "text": (data.text_column,),
        "label": (data.text_column, data.label_column),
        "image": (data.image_column, data.label_column),
    }


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader) -> list[Example]:
    """The examples of all rows that have something to predict, in order. The number of other rows is logged.

    Args:
        rows: the rows of one client, or the held-out rows.
        tokenizer: the model's tokenizer.
        data: the section data, with form, columns, system prompt and `max_length`.
        task: the run's task.

    Raises:
        DataError: a column is missing, the task cannot use a value, or none of the rows has anything to predict.
    """
    idle = nothing_to_predict(rows, tokenizer, data, task)
    if idle:
        said = left_out(rows, idle, data)
        if len(idle) == len(rows):
            raise DataError(said)
        _log.warning("%s", said)
        rows = rows.select(usable_of(rows, idle))
    task.check_rows(rows, data)
    return encode_usable(rows, tokenizer, data, task)


def nothing_to_predict(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader
) -> dict[int, str]:
    """The rows that have nothing to predict: number of the row -> reason, for instance no text, answer or class.

    Args:
        rows, tokenizer, data, task: as in `encode`.

    Raises:
        DataError: a column is missing, or the task cannot use a value.
    """
    idle, faults = task.unusable(rows, tokenizer, data)
    if faults:
        raise DataError(f"{data.source}: {places(rows, [at := min(faults)], data)}: {faults[at]}")
    return idle


def usable_of(rows: Dataset, idle: Mapping[int, str]) -> list[int]:
    """The numbers of the rows that are not in `idle`."""
    return [at for at in range(len(rows)) if at not in idle]


def usable_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader) -> list[int]:
    """The numbers of the rows that have something to predict.

    Args:
        rows, tokenizer, data, task: as in `encode`.

    Raises:
        DataError: a column is missing, or the task cannot use a value.
    """
    return usable_of(rows, nothing_to_predict(rows, tokenizer, data, task))


def left_out(rows: Dataset, idle: Mapping[int, str], data: DataConfig) -> str:
    """The message about the rows that have nothing to predict.

    Args:
        rows: all rows.
        idle: number of a row -> reason why it has nothing to predict.
        data: the section data, which names the source.
    """
    kinds: dict[str, list[int]] = {}
    for at, why in idle.items():
        kinds.setdefault(why, []).append(at)
    said = "; ".join(f"{why} ({places(rows, at, data)})" for why, at in kinds.items())
    if len(idle) == len(rows):
        return f"{data.source}: none of {len(rows)} rows has anything to predict: {said}"
    return f"{data.source}: {len(idle)} of {len(rows)} rows have nothing to predict and are left out: {said}"


def each(rows: Dataset, read: Callable[[Mapping[str, Any]], _Read]) -> tuple[list[_Read | None], dict[int, str]]:
    """The result of `read` for every row (None if it fails), and number of the row -> reason for those that fail."""
    found: list[_Read | None] = []
    faults: dict[int, str] = {}
    columns: dict[str, list[Any]] = rows[:] if len(rows) else {}
    for at, cells in enumerate(zip(*columns.values(), strict=True)):
        try:
            found.append(read(dict(zip(columns, cells, strict=True))))
        except RowError as error:
            found.append(None)
            faults[at] = str(error)
    return found, faults


def encode_usable(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader
) -> list[Example]:
    """An example for each row, for rows that were checked and all have something to predict."""
    found, faults = task.encode(rows, tokenizer, data)
    if faults:
        raise DataError(f"{data.source}: {places(rows, [at := min(faults)], data)}: {faults[at]}")
    return [example for example in found if example is not None]


def unanswered(row: Mapping[str, Any], form: str, data: DataConfig) -> str:
    """The reason why a conversation has nothing to predict; empty if it has something."""
    answers = conversation(row, form, data).answers
    if any(words.strip() for words in answers):
        return ""
    if answers:
        return "an empty answer"
    listed = {"chat": data.messages_column, "sharegpt": "conversations"}.get(form, "")
    return "an empty list of messages" if listed and row[listed] == [] else "no assistant's message after another one"


def too_short(column: list[str], tokenizer: PreTrainedTokenizerBase | None, least: int) -> dict[int, str]:
    """Number of the text -> reason, for texts that are blank or have fewer tokens than `least`."""
    blank = {at: "a blank text" for at, words in enumerate(column) if not words.strip()}
    if tokenizer is None:
        return blank
    enough = _have_tokens([words[:_ENOUGH] for words in column], tokenizer, least)
    short_ones = [i for i, words in enumerate(column) if not enough[i] and len(words) > _ENOUGH]
    for i, good in zip(short_ones, _have_tokens([column[i] for i in short_ones], tokenizer, least), strict=True):
        enough[i] = good
    few = "a text without tokens" if least == 1 else "a text of fewer than two tokens, its end token included"
    return {at: few for at, good in enumerate(enough) if not good} | blank


def _have_tokens(column: list[str], tokenizer: PreTrainedTokenizerBase, least: int) -> list[bool]:
    """For each text, whether it has at least so many tokens; if `least` is 2, with the end token that is added."""
    tokens = tokenizer(column, verbose=False)["input_ids"] if column else []
    if least == 1:
        return [bool(ids) for ids in tokens]
    return [len(ids) + len(end_token(ids, tokenizer)) >= least for ids in tokens]


def end_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, if the tokenizer has one and has not added it itself; else nothing."""
    end: Any = tokenizer.eos_token_id
    return [] if end is None or ids[-1:] == [end] else [end]


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
