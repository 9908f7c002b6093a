"""Conversations as examples, within `data.max-length`: whole turns go from the front, and no question goes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .conversations import Conversation, RowError
from .rendering import Template, spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWERING = ("assistant", "tool", "system")  # who else speaks asks
_OTHER = "\ue000"  # a text that no question begins with


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    Args:
        ids: at most `data.max-length`.
        learned: which of them the loss is taken of.
        whole: how many tokens the conversation has.
        cut: what was cut to fit, as in `Example.cut`.
    """

    ids: np.ndarray
    learned: np.ndarray
    whole: int
    cut: str


@dataclass(frozen=True)
class _Tokens:
    """Args:
    ids: of a conversation up to its last learned token: what comes after it changes nothing.
    learned: those that the loss is taken of.
    last: where each token's characters end in `text`.
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

    What is too long loses its earlier exchanges, one by one from the front; then, where the last exchange fits
    alone, its own system prompt; and else a part of the last exchange: of the question the start, of the answer the
    end, which has half of the room or all that it needs. The system prompt stays at the front there as long as it
    takes no more than half of `length`.

    Raises:
        RowError: the template refuses the conversation, or nothing of it can be learned.
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
    """Where questions begin that an answer follows; the first message that is no system prompt is always one."""
    messages = chat.messages
    first = int(messages[0]["role"] == "system")
    answered = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    asks = [message["role"] not in _ANSWERING for message in messages]
    return [i for i in range(first, answered) if i == first or (asks[i] and not asks[i - 1])]


def _first_that_fits(shorter: Sequence[Conversation], render: Template, length: int) -> _Tokens | None:
    """The longest of ever shorter conversations that fits; the first is known not to."""
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
    except RowError:  # what the template takes only as a whole
        return None
    return tokens if len(tokens.ids) <= length else None


def _cut_inside(last: Conversation, asked: int, render: Template, length: int, whole: int) -> Encoded:
    """A part of the last exchange, under what comes before its first words where that leaves half of the room."""
    tokens = _tokens(last, render)
    question = {**last.messages[asked], "content": _OTHER}
    other = render([*last.messages[:asked], question, *last.messages[asked + 1 :]], last.tools)
    front = int(np.searchsorted(tokens.last, _common(tokens.text, other), side="right"))
    front = 0 if front > length // 2 or tokens.learned[:front].any() else front
    at = front + _window_start(tokens.learned[front:], length - front)
    return tokens.encoded("inside", whole, np.r_[0:front, at : at + length - front])


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
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
    # A token without characters of its own (white space that the tokenizer trims) counts where it stands.
    first, last = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    learned = np.any([(last > start) & (first < end) for start, end in turns], axis=0)
    end = np.flatnonzero(learned)[-1] + 1
    return _Tokens(ids[:end], learned[:end], offsets[:end, 1], text)


def _in_pieces(text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of a text whose tokens must not reach across the cuts.

    A prompt is tokenized alone when a response is generated. Where one token would hold the prompt's last
    characters and the response's first (such as two newlines), the pieces are tokenized one by one here too.
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
    """The earliest window of `length` tokens with `length // 2` learned ones, or with the most there are."""
    if len(learned) <= length:
        return 0
    before = np.concatenate([[0], np.cumsum(learned)])
    held = before[length:] - before[:-length]
    return int(np.argmax(held >= min(length // 2, held.max())))
