"""From rows to examples: tokens, and the labels that the loss is taken of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # torch's cross entropy leaves this label out

Message = Mapping[str, str]


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
    """What the rows hold: "prompt", "chat", "text" or "label".

    Args:
        columns: those of the rows.
        data: `form` and the names of the columns; "auto" takes the first of chat, prompt and text whose
            columns are there, and "label" for classification.
        task: "causal-lm" or "classification".

    Raises:
        DataError: a column is missing (naming those that exist), or the form does not fit the task.
    """
    wanted = {name: column_names(name, data) for name in ("chat", "prompt", "text")}
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
            f"classification takes form 'label', causal-lm takes 'prompt', 'chat' or 'text'"
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
        "text": (data.text_column,),
        "label": (data.text_column, data.label_column),
    }[form]


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: str, labels: int = 2
) -> list[Example]:
    """Examples, one per row and in the same order.

    Forms prompt and chat go through the tokenizer's chat template, and the loss is taken of what the assistant
    says and of the token that ends its turn. A tokenizer without a template gets "prompt\\nresponse" and the end
    token. An assistant turn that the template renders otherwise once more turns follow (some drop the reasoning
    of earlier ones) is context, not loss. Form text learns every token and the end token.

    A conversation longer than `data.max-length` keeps the window that starts earliest among those with half of
    `max-length` in response tokens (or all there are): long prompts lose their start, long responses their end.

    Args:
        rows: of one client, or the held-out ones.
        tokenizer: a fast one (it must give character offsets).
        data: form, columns, system prompt and `max_length`.
        task: "causal-lm" or "classification".
        labels: number of classes.

    Raises:
        DataError: a column is missing, a value is no text, a class is out of range, or a conversation has
            nothing to learn.
    """
    form = form_of(rows.column_names, data, task)
    if not len(rows):
        return []
    columns: dict[str, list[Any]] = rows[:]
    if form == "label":
        return _encode_classes(columns, tokenizer, data, labels)
    if form == "text":
        return _encode_texts(_texts(columns[data.text_column], data.text_column, data), tokenizer, data)
    chats = _pairs(columns, data) if form == "prompt" else _chats(columns[data.messages_column], data)
    return _encode_chats([_with_system(chat, data.system_prompt) for chat in chats], tokenizer, data)


def _encode_classes(
    columns: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: int
) -> list[Example]:
    texts = _texts(columns[data.text_column], data.text_column, data)
    tokens = tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"]
    classes = columns[data.label_column]
    for text, label in zip(texts, classes, strict=True):
        if not isinstance(label, int) or not 0 <= label < labels:
            raise DataError(
                f"{data.source}: column {data.label_column!r} holds the class {label!r} in the row {_short(text)}, "
                f"expected 0 to {labels - 1}; set model.labels to the number of classes"
            )
    return [Example(ids, int(label)) for ids, label in zip(tokens, classes, strict=True)]


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Example]:
    examples = []
    for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
        if not text.strip():
            raise DataError(f"{data.source}: column {data.text_column!r} holds an empty text; drop such rows")
        end = [] if tokenizer.eos_token_id in (None, ids[-1]) else [tokenizer.eos_token_id]
        kept = [*ids, *end][: data.max_length]
        examples.append(Example(kept, list(kept)))
    return examples


def _pairs(columns: Mapping[str, list[Any]], data: DataConfig) -> Iterable[list[Message]]:
    prompts = _texts(columns[data.prompt_column], data.prompt_column, data)
    responses = _texts(columns[data.response_column], data.response_column, data)
    for prompt, response in zip(prompts, responses, strict=True):
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _chats(values: list[Any], data: DataConfig) -> Iterable[list[Message]]:
    for value in values:
        messages = value if isinstance(value, list) else [value]
        for message in messages:
            good = isinstance(message, Mapping) and all(
                isinstance(message.get(key), str) for key in ("role", "content")
            )
            if not good:
                raise DataError(
                    f"{data.source}: column {data.messages_column!r} holds {_short(message)}, expected a list of "
                    f"{{'role': ..., 'content': ...}} with texts"
                )
        yield [{"role": message["role"], "content": message["content"]} for message in messages]


def _with_system(messages: list[Message], system_prompt: str) -> list[Message]:
    """The conversation under `system_prompt`, which takes the place of its own system message."""
    if not system_prompt:
        return messages
    own = bool(messages) and messages[0]["role"] == "system"
    return [{"role": "system", "content": system_prompt}, *messages[own:]]


def _encode_chats(chats: list[list[Message]], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Example]:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, which forms prompt and chat need to find the "
            f"response; use a model with a tokenizer.json, or data.form = 'text'"
        )
    rendered = [_spans(chat, tokenizer, data) for chat in chats]
    texts = [text for text, _ in rendered]
    special = not tokenizer.chat_template  # a template writes the start token itself
    tokens = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    examples = []
    for i, (text, spans) in enumerate(rendered):
        ids, offsets = np.array(tokens["input_ids"][i]), np.array(tokens["offset_mapping"][i])
        starts = [start for start, _ in spans]
        if any(((offsets[:, 0] < start) & (start < offsets[:, 1])).any() for start in starts):
            ids, offsets = _tokens_in_pieces(text, starts, tokenizer)
        # A token without characters of its own (white space that the tokenizer trims) counts where it stands.
        first, last = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        learned = np.any([(last > start) & (first < end) for start, end in spans], axis=0)
        learned = learned[: np.flatnonzero(learned)[-1] + 1]  # what comes after the last one changes nothing
        window = slice((at := _window_start(learned, data.max_length)), at + data.max_length)
        ids = ids[: len(learned)]
        labels = np.where(learned, ids, IGNORED)
        examples.append(Example(ids[window].tolist(), labels[window].tolist()))
    return examples


def _spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it (characters, end exclusive) the assistant's turns stand."""
    from jinja2 import TemplateError

    spans = []
    text = ""
    try:
        text = _render(messages, tokenizer)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue  # what no prompt comes before is context
            head = _render(messages[:i], tokenizer, open_turn=True)
            upto = text if i + 1 == len(messages) else _render(messages[: i + 1], tokenizer)
            if text.startswith(upto) and upto.startswith(head):
                end = _turn_end(upto, tokenizer)
                spans += [(len(head), end)] if end > len(head) else []
    except TemplateError as error:
        raise DataError(
            f"{data.source}: the tokenizer's chat template refuses the roles {[m['role'] for m in messages]}: {error}"
        ) from None
    if not spans:
        raise DataError(
            f"{data.source}: nothing to learn in {_short(messages)}: expected an assistant message that is not empty "
            f"after another one, and a chat template that continues the prompt when it renders the response"
        )
    return text, spans


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, open_turn: bool = False) -> str:
    """The conversation as text; `open_turn` adds what the assistant's next turn starts with."""
    if tokenizer.chat_template:
        chat = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_turn))
    end = str(tokenizer.eos_token or "")
    return "".join(m["content"] + (end if m["role"] == "assistant" else "\n") for m in messages)


def _turn_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the last turn ends: after its end token, not after the white space that templates put behind it."""
    ends = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    trimmed = text.rstrip()
    return len(trimmed) if trimmed.endswith(ends) else len(text)


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


def _texts(values: list[Any], column: str, data: DataConfig) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise DataError(
                f"{data.source}: column {column!r} holds {_short(value)} ({type(value).__name__}), expected text in "
                f"every row; drop or convert such rows"
            )
    return values


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
