"""From rows to examples: tokens, and the labels that the loss is taken of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.conversations import Conversation, conversations, short, texts
from fedlora.data.rendering import Template, spans
from fedlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # torch's cross entropy leaves this label out
_AUTO = ("chat", "prompt", "sharegpt", "alpaca", "text")  # the first whose columns are there
_ENOUGH = 256  # characters that are more than one token, but for words that a vocabulary lacks
_log = logging.getLogger("fedlora")


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Args:
        input_ids: tokens, at most `data.max-length`.
        labels: for a causal LM, each token itself where the loss is taken and -100 elsewhere (not shifted: the
            model shifts); for classification, the class.
    """

    input_ids: list[int]
    labels: list[int] | int


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

    A conversation longer than `data.max-length` keeps the window that starts earliest among those with half of
    `max-length` in response tokens (or all there are): long prompts lose their start, long responses their end.

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
    usable = usable_rows(rows, tokenizer, data, task)
    if len(usable) < len(rows):
        said = left_out(rows, usable, data, task)
        if not usable:
            raise DataError(said)
        _log.warning("%s", said)
        rows = rows.select(usable)
    return encode_usable(rows, tokenizer, data, task, labels)


def usable_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str) -> list[int]:
    """Where there is something to predict: a token after another, an assistant's turn, or the class of a text.

    Args:
        rows, tokenizer, data, task: as for `encode`.

    Raises:
        DataError: a column is missing, or a value is no text.
    """
    form = form_of(rows.column_names, data, task)
    if not len(rows):
        return []
    if form not in ("text", "label"):
        silent = not tokenizer.chat_template and tokenizer.eos_token_id is None  # an empty answer is no token then
        if form in ("prompt", "alpaca") and not silent:
            return list(range(len(rows)))
        found = conversations(rows[:], form, data)
        return [i for i, one in enumerate(found) if any(text or not silent for text in one.answers)]
    column = texts(rows.select_columns([data.text_column])[:][data.text_column], data.text_column, data)
    least = 1 if form == "label" else 2
    enough = _have_tokens([text[:_ENOUGH] for text in column], tokenizer, least)
    short_ones = [i for i, text in enumerate(column) if not enough[i] and len(text) > _ENOUGH]
    for i, good in zip(short_ones, _have_tokens([column[i] for i in short_ones], tokenizer, least), strict=True):
        enough[i] = good
    return [i for i, text in enumerate(column) if enough[i] and text.strip()]


def left_out(rows: Dataset, usable: Sequence[int], data: DataConfig, task: str) -> str:
    """What is said of the rows that have nothing to predict."""
    form = form_of(rows.column_names, data, task)
    first = next(i for i, place in enumerate([*usable, -1]) if i != place)
    shown = ", ".join(short(rows[first][name]) for name in column_names(form, data))
    why = {
        "text": "a text needs two tokens, its end token included",
        "label": "a text needs a token that is no space",
    }.get(form, "a conversation needs an assistant's message that is not empty after another one")
    if not len(usable):
        return f"{data.source}: none of {len(rows)} rows has anything to predict: {why}; the first holds {shown}"
    return (
        f"{data.source}: {len(rows) - len(usable)} of {len(rows)} rows have nothing to predict and are left out, "
        f"the first holds {shown}"
    )


def encode_usable(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str, labels: int = 2
) -> list[Example]:
    """`encode` of rows that all have something to predict: an example for each."""
    form = form_of(rows.column_names, data, task)
    if not len(rows):
        return []
    columns: dict[str, list[Any]] = rows[:]
    if form == "label":
        return _encode_classes(columns, tokenizer, data, labels)
    if form == "text":
        return _encode_texts(texts(columns[data.text_column], data.text_column, data), tokenizer, data)
    return _encode_chats(conversations(columns, form, data), tokenizer, data)


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


def _encode_classes(
    columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: int
) -> list[Example]:
    column = texts(columns[data.text_column], data.text_column, data)
    tokens = tokenizer(column, truncation=True, max_length=data.max_length)["input_ids"]
    classes = columns[data.label_column]
    for text, label in zip(column, classes, strict=True):
        if not isinstance(label, int) or not 0 <= label < labels:
            raise DataError(
                f"{data.source}: column {data.label_column!r} holds the class {label!r} in the row {short(text)}, "
                f"expected 0 to {labels - 1}; set model.labels to the number of classes"
            )
    return [Example(ids, int(label)) for ids, label in zip(tokens, classes, strict=True)]


def _encode_texts(column: list[str], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Example]:
    examples = []
    for ids in tokenizer(column, verbose=False)["input_ids"]:
        kept = [*ids, *_end(ids, tokenizer)][: data.max_length]
        examples.append(Example(kept, list(kept)))
    return examples


def _encode_chats(chats: list[Conversation], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Example]:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which conversations need to find the "
            f"response; use a model with a tokenizer.json, or data.form = 'text'"
        )
    render = Template(tokenizer, data)
    rendered = [spans(chat, render, data) for chat in chats]
    special = not tokenizer.chat_template  # a template writes the start token itself
    tokens = tokenizer(
        [text for text, _ in rendered], add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    examples = []
    for i, (text, turns) in enumerate(rendered):
        ids, offsets = np.array(tokens["input_ids"][i]), np.array(tokens["offset_mapping"][i])
        starts = [start for start, _ in turns]
        if any(((offsets[:, 0] < start) & (start < offsets[:, 1])).any() for start in starts):
            ids, offsets = _tokens_in_pieces(text, starts, tokenizer)
        # A token without characters of its own (white space that the tokenizer trims) counts where it stands.
        first, last = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        learned = np.any([(last > start) & (first < end) for start, end in turns], axis=0)
        learned = learned[: np.flatnonzero(learned)[-1] + 1]  # what comes after the last one changes nothing
        window = slice((at := _window_start(learned, data.max_length)), at + data.max_length)
        ids = ids[: len(learned)]
        labels = np.where(learned, ids, IGNORED)
        examples.append(Example(ids[window].tolist(), labels[window].tolist()))
    return examples


def _tokens_in_pieces(text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of a text whose tokens must not reach across the cuts.

    A prompt is tokenized alone when a response is generated. Where one token would hold the prompt's last
    characters and the response's first (such as two newlines), the pieces are tokenized one by one here too.
    """
    ids, offsets = [], []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        special = start == 0 and not tokenizer.chat_template
        piece = tokenizer(text[start:end], add_special_tokens=special, return_offsets_mapping=True)
        ids += piece["input_ids"]
        offsets += [(first + start, last + start) for first, last in piece["offset_mapping"]]
    return np.array(ids), np.array(offsets)


def _window_start(learned: np.ndarray, length: int) -> int:
    """The earliest window of `length` tokens with `length // 2` learned ones, or with the most there are."""
    if len(learned) <= length:
        return 0
    before = np.concatenate([[0], np.cumsum(learned)])
    held = before[length:] - before[:-length]
    return int(np.argmax(held >= min(length // 2, held.max())))


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
