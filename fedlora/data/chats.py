"""Conversations as tokens, cut to `data.max-length`: whole exchanges, question and answer, are cut from the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .conversations import Conversation, RowError
from .rendering import Template, spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWERING = ("assistant", "tool", "system")  # messages of all other roles count as questions
_OTHER = "\ue000"  # a text with which no question begins


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    Args:
        ids: the tokens, at most `data.max-length`.
        learned: for each token, whether it is in the loss.
        whole: number of tokens of the whole conversation, before it was cut.
        cut: the kind of cut, as in `Example.cut`.
    """

    ids: np.ndarray
    learned: np.ndarray
    whole: int
    cut: str


@dataclass(frozen=True)
class _Tokens:
    """A conversation up to its last learned token; tokens after it would change nothing.

    Args:
        ids: the tokens.
        learned: for each token, whether it is in the loss.
        last: for each token, where its characters end in `text`.
        text: the conversation as the template writes it.
    """

    ids: np.ndarray
    learned: np.ndarray
    last: np.ndarray
    text: str

    def encoded(self, cut: str, whole: int, kept: np.ndarray | slice = slice(None)) -> Encoded:
        return Encoded(self.ids[kept], self.learned[kept], whole, cut)


def encode_chat(chat: Conversation, render: Template, length: int) -> Encoded:
    """One conversation as at most `length` tokens.

    A conversation that is too long is cut in this order, until it fits. First, its exchanges are dropped one by one
    from the front, except the last one. If the last exchange fits alone, the system prompt is dropped. Otherwise a part
    of the last exchange is cut: the start of the question and the end of the answer, where the answer gets half of the
    room, or less if it needs less. In that case the system prompt is kept if it takes at most half of `length`.

    Raises:
        RowError: the template refuses the conversation, or nothing in it can be learned.
    """
    whole = _tokens(chat, render)
    if len(whole.ids) <= length:
        return whole.encoded("", len(whole.ids))
    system = chat.messages[: chat.messages[0]["role"] == "system"]
    starts = _exchanges(chat)
    shorter = [replace(chat, messages=[*system, *chat.messages[start:]]) for start in starts]
    first = _first_that_fits(shorter, render, length)
    if first is not None:
        return first.encoded("turns", len(whole.ids))
    last = replace(chat, messages=chat.messages[starts[-1] :])
    if system and (found := _within(last, render, length)):
        return found.encoded("system", len(whole.ids))
    return _cut_inside(shorter[-1], len(system), render, length, len(whole.ids))


def _exchanges(chat: Conversation) -> list[int]:
    """The numbers of the messages with which exchanges begin; the first one after a system prompt always counts."""
    messages = chat.messages
    first = int(messages[0]["role"] == "system")
    answered = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    asks = [message["role"] not in _ANSWERING for message in messages]
    return [i for i in range(first, answered) if i == first or (asks[i] and not asks[i - 1])]


def _first_that_fits(shorter: Sequence[Conversation], render: Template, length: int) -> _Tokens | None:
    """The first conversation that fits, by bisection; `shorter` is in descending order, and its first does not fit."""
    found: _Tokens | None = None
    low, high = 1, len(shorter)
    while low < high:
        middle = (low + high) // 2
        tokens = _within(shorter[middle], render, length)
        if tokens is None:
            low = middle + 1
        else:
            high, found = middle, tokens
    return found


def _within(chat: Conversation, render: Template, length: int) -> _Tokens | None:
    try:
        tokens = _tokens(chat, render)
    except RowError:  # the template accepts only the whole conversation
        return None
    return tokens if len(tokens.ids) <= length else None


def _cut_inside(last: Conversation, asked: int, render: Template, length: int, whole: int) -> Encoded:
    """A part of the last exchange, after everything before its first words if that is at most half of `length`."""
    tokens = _tokens(last, render)
    question = {**last.messages[asked], "content": _OTHER}
    other = render([*last.messages[:asked], question, *last.messages[asked + 1 :]], last.tools)
    front = int(np.searchsorted(tokens.last, _common(tokens.text, other), side="right"))
    front = 0 if front > length // 2 or tokens.learned[:front].any() else front
    at = front + _window_start(tokens.learned[front:], length - front)
    return tokens.encoded("inside", whole, np.r_[0:front, at : at + length - front])


def _common(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their start."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tokens(chat: Conversation, render: Template) -> _Tokens:
    tokenizer = render.tokenizer
    text, turns = spans(chat, render)
    special = not tokenizer.chat_template  # a template writes the start token itself
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, offsets = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"])
    starts = [start for start, _ in turns]
    if any(((offsets[:, 0] < start) & (start < offsets[:, 1])).any() for start in starts):
        ids, offsets = _in_pieces(text, starts, tokenizer)
    # A token without characters (white space that the tokenizer trims) counts as the character at its position.
    first, last = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    learned = np.any([(last > start) & (first < end) for start, end in turns], axis=0)
    end = np.flatnonzero(learned)[-1] + 1
    return _Tokens(ids[:end], learned[:end], offsets[:end, 1], text)


def _in_pieces(text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of a text of which each piece between the cuts is tokenized by itself.

    When a response is generated, its prompt is tokenized by itself. If one token would contain both the last characters
    of the prompt and the first of the response (such as two newlines), training has to do the same.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        special = start == 0 and not tokenizer.chat_template
        piece: Any = tokenizer(text[start:end], add_special_tokens=special, return_offsets_mapping=True)
        ids += piece["input_ids"]
        offsets += [(first + start, last + start) for first, last in piece["offset_mapping"]]
    return np.array(ids), np.array(offsets)


def _window_start(learned: np.ndarray, length: int) -> int:
    """The start of the first window of `length` tokens with `length // 2` learned ones, or with the most possible."""
    if len(learned) <= length:
        return 0
    before = np.concatenate([[0], np.cumsum(learned)])
    held = before[length:] - before[:-length]
    return int(np.argmax(held >= min(length // 2, held.max())))
