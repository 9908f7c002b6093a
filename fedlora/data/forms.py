"""From rows to examples: tokens, and the labels that the loss is taken of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

from .chats import encode_chat
from .classes import check_classes
from .conversations import RowError, conversation, text
from .examples import Example
from .places import places
from .rendering import Template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_AUTO = ("chat", "prompt", "sharegpt", "alpaca", "text")  # the first whose columns are there
_ENOUGH = 256  # characters that are more than one token, but for words that a vocabulary lacks
_Read = TypeVar("_Read")
_log = logging.getLogger("fedlora")


def form_of(columns: Sequence[str], data: DataConfig, task: str) -> str:
    """What the rows hold: "prompt", "chat", "alpaca", "sharegpt", "text" or "label".

    Args:
        columns: those of the rows.
        data: `form` and the names of the columns; "auto" takes the first of chat, prompt, sharegpt, alpaca and text
            whose columns are there, and "label" for classification.
        task: "causal-lm" or "classification".

    Raises:
        DataError: a column is missing (naming those that exist), or the form does not fit the task.
    """
    wanted = {name: column_names(name, data) for name in _AUTO}
    form = data.form
    if form == "auto":
        found = [name for name, names in wanted.items() if set(names) <= set(columns)]
        form = "label" if task == "classification" else next(iter(found), "")
    if not form:
        raise DataError(
            f"{data.source}: the form of its rows cannot be told from the columns {_list(columns)}; expected "
            f"{' or '.join(_list(names) for names in wanted.values())}; name yours with data.prompt-column, "
            f"data.response-column, data.messages-column or data.text-column"
        )
    if (form == "label") != (task == "classification"):
        raise DataError(
            f"{data.source}: data.form = {form!r} does not fit model.task = {task!r}; "
            f"classification takes form 'label', causal-lm takes {_list(_AUTO)}"
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
    return {
        "prompt": (data.prompt_column, data.response_column),
        "chat": (data.messages_column,),
        "alpaca": ("instruction", "output"),
        "sharegpt": ("conversations",),
        "text": (data.text_column,),
        "label": (data.text_column, data.label_column),
    }[form]


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str, labels: int = 2
) -> list[Example]:
    """Examples of the rows that have something to predict, in their order; how many have not is logged.

    Conversations (all forms but text and label) go through the tokenizer's chat template, and the loss is taken of
    what the assistant says and of the token that ends its turn. A tokenizer without a template gets
    "prompt\\nresponse" and the end token. An assistant turn that the template renders otherwise once more turns follow
    (some drop the reasoning of earlier ones) is context, not loss. Form text learns every token and the end token.

    What is longer than `data.max-length` is cut, see `fedlora.data.chats`; a text loses its end.

    Args:
        rows: of one client, or the held-out ones.
        tokenizer: a fast one (it must give character offsets).
        data: form, columns, system prompt and `max_length`.
        task: "causal-lm" or "classification".
        labels: number of classes.

    Raises:
        DataError: a column is missing, a value is no text, a class is out of range, or there are rows and none has
            anything to predict.
    """
    idle = nothing_to_predict(rows, tokenizer, data, task)
    if idle:
        said = left_out(rows, idle, data)
        if len(idle) == len(rows):
            raise DataError(said)
        _log.warning("%s", said)
        rows = rows.select(usable_of(rows, idle))
    if task == "classification":
        check_classes(rows, data, labels)
    return encode_usable(rows, tokenizer, data, task)


def nothing_to_predict(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str
) -> dict[int, str]:
    """Why rows have nothing to predict, by their places: no token after another, no answer, or no class of a text.

    Args:
        rows, tokenizer, data, task: as for `encode`.

    Raises:
        DataError: a column is missing, or a value is no text.
    """
    idle, faults = looked_at(rows, tokenizer, data, task)
    if faults:
        raise DataError(f"{data.source}: {places(rows, [at := min(faults)], data)}: {faults[at]}")
    return idle


def looked_at(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig, task: str
) -> tuple[dict[int, str], dict[int, str]]:
    """By their places, why rows have nothing to predict, and what is wrong with others; see `nothing_to_predict`.

    Without a tokenizer, texts that are not blank are held to have tokens.

    Raises:
        DataError: a column is missing.
    """
    form = form_of(rows.column_names, data, task)
    if form in ("text", "label"):
        column, faults = each(rows, lambda row: "" if row[data.text_column] is None else text(row, data.text_column))
        idle = _too_short([words or "" for words in column], tokenizer, least=1 if form == "label" else 2)
        if form == "label":
            blank = [label is None for label in rows[:][data.label_column]] if len(rows) else []
            idle |= {at: "a blank label" for at, none in enumerate(blank) if none and at not in idle}
        return {at: why for at, why in idle.items() if at not in faults}, faults
    found, faults = each(rows, lambda row: _unanswered(row, form, data))
    return {at: why for at, why in enumerate(found) if why}, faults


def usable_of(rows: Dataset, idle: Mapping[int, str]) -> list[int]:
    """The places of the other rows."""
    return [at for at in range(len(rows)) if at not in idle]


def usable_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str) -> list[int]:
    """Where there is something to predict: a token after another, an assistant's turn, or the class of a text.

    Args:
        rows, tokenizer, data, task: as for `encode`.

    Raises:
        DataError: a column is missing, or a value is no text.
    """
    return usable_of(rows, nothing_to_predict(rows, tokenizer, data, task))


def left_out(rows: Dataset, idle: Mapping[int, str], data: DataConfig) -> str:
    """What is said of the rows that have nothing to predict.

    Args:
        rows: among which they are.
        idle: why, by their places.
        data: names the source.
    """
    kinds: dict[str, list[int]] = {}
    for at, why in idle.items():
        kinds.setdefault(why, []).append(at)
    said = "; ".join(f"{why} ({places(rows, at, data)})" for why, at in kinds.items())
    if len(idle) == len(rows):
        return f"{data.source}: none of {len(rows)} rows has anything to predict: {said}"
    return f"{data.source}: {len(idle)} of {len(rows)} rows have nothing to predict and are left out: {said}"


def each(rows: Dataset, read: Callable[[Mapping[str, Any]], _Read]) -> tuple[list[_Read | None], dict[int, str]]:
    """What is read of every row, and by the places of those that cannot be read, why."""
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


def encode_usable(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str) -> list[Example]:
    """`encode` of rows that all have something to predict, and classes that there are: an example for each."""
    found, faults = encode_each(rows, tokenizer, data, task)
    if faults:
        raise DataError(f"{data.source}: {places(rows, [at := min(faults)], data)}: {faults[at]}")
    return [example for example in found if example is not None]


def encode_each(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str
) -> tuple[Sequence[Example | None], dict[int, str]]:
    """`encode_usable`, and by the places of rows that cannot be an example, why."""
    form = form_of(rows.column_names, data, task)
    if not len(rows):
        return [], {}
    columns: dict[str, list[Any]] = rows[:]
    if form == "label":
        return _encode_classes(columns, tokenizer, data), {}
    if form == "text":
        return _encode_texts(columns[data.text_column], tokenizer, data), {}
    render = Template(_fast(tokenizer), data)
    return each(rows, lambda row: encode_chat(conversation(row, form, data), render, data.max_length))


def _unanswered(row: Mapping[str, Any], form: str, data: DataConfig) -> str:
    """Why a conversation has nothing to predict; empty where it has."""
    answers = conversation(row, form, data).answers
    if any(words.strip() for words in answers):
        return ""
    if answers:
        return "an empty answer"
    listed = {"chat": data.messages_column, "sharegpt": "conversations"}.get(form, "")
    return "an empty list of messages" if listed and row[listed] == [] else "no assistant's message after another one"


def _too_short(column: list[str], tokenizer: PreTrainedTokenizerBase | None, least: int) -> dict[int, str]:
    """Why texts have nothing to predict, by their places: blank, or fewer tokens than `least`."""
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
    """Whether each text is at least so many tokens; two, with the end token that `_encode_texts` adds."""
    tokens = tokenizer(column, verbose=False)["input_ids"] if column else []
    if least == 1:
        return [bool(ids) for ids in tokens]
    return [len(ids) + len(_end(ids, tokenizer)) >= least for ids in tokens]


def _end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, where the tokenizer has one and has not put it there."""
    end: Any = tokenizer.eos_token_id
    return [] if end is None or ids[-1:] == [end] else [end]


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which conversations need to find the "
            f"response; use a model with a tokenizer.json, or data.form = 'text'"
        )
    return tokenizer


def _encode_classes(
    columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[Example]:
    examples = []
    whole = tokenizer(columns[data.text_column], verbose=False)["input_ids"]
    for words, ids, label in zip(columns[data.text_column], whole, columns[data.label_column], strict=True):
        fits = len(ids) <= data.max_length
        kept = ids if fits else tokenizer(words, truncation=True, max_length=data.max_length)["input_ids"]
        examples.append(Example(kept, int(label), len(ids), "" if fits else "end"))
    return examples


def _encode_texts(column: list[str], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Example]:
    examples = []
    for ids in tokenizer(column, verbose=False)["input_ids"]:
        whole = [*ids, *_end(ids, tokenizer)]
        kept = whole[: data.max_length]
        examples.append(Example(kept, list(kept), len(whole), "end" if len(kept) < len(whole) else ""))
    return examples


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
