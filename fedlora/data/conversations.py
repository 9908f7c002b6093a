"""From rows to conversations: the shapes that people's data has, as the messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import Any

from fedlora.config import DataConfig
from fedlora.errors import DataError, suggest

Message = Mapping[str, Any]

# Of form alpaca, and beside the messages of form sharegpt.
TEXT_COLUMNS = ("instruction", "input", "output", "system", "tools")
# Who speaks in ShareGPT's `from`, by the name that chat templates have for it.
_SPEAKERS = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "bing": "assistant",
        "bard": "assistant",
        "function_call": "assistant",
        "tool_call": "assistant",
        "tool": "tool",
        "observation": "tool",
        "function": "tool",
        "function_response": "tool",
        "tool_response": "tool",
    }
)


@dataclass(frozen=True)
class Conversation:
    """Args:
    messages: with "role" and "content", up to the assistant's last turn: what follows it is neither learned nor read.
    tools: descriptions of functions that the assistant may call, as chat templates take them.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] = ()

    @property
    def answers(self) -> list[str]:
        """What the assistant says after another one."""
        return [message["content"] for message in self.messages[1:] if message["role"] == "assistant"]


def conversations(columns: Mapping[str, list[Any]], form: str, data: DataConfig) -> list[Conversation]:
    """One per row.

    Args:
        columns: all of the rows.
        form: "prompt", "chat", "alpaca" or "sharegpt".
        data: names of the columns, and the system prompt.

    Raises:
        DataError: a value is no text, or no list of messages.
    """
    if form == "prompt":
        prompts = texts(columns[data.prompt_column], data.prompt_column, data)
        responses = texts(columns[data.response_column], data.response_column, data)
        found = [_pair(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    elif form == "alpaca":
        found = _alpaca(columns, data)
    else:
        column = data.messages_column if form == "chat" else "conversations"
        found = [_messages(value, column, data) for value in columns[column]]
    if form in ("alpaca", "sharegpt"):
        systems = _optional(columns, "system", data)
        found = [_under(messages, system, own=True) for messages, system in zip(found, systems, strict=True)]
    tools = columns.get("tools", repeat(None)) if form in ("chat", "sharegpt") else repeat(None)
    return [
        Conversation(_to_last_answer(_under(messages, data.system_prompt)), _tools(listed, data))
        for messages, listed in zip(found, tools, strict=False)
    ]


def texts(values: list[Any], column: str, data: DataConfig) -> list[str]:
    """The values of a column, which are texts.

    Raises:
        DataError: one is not.
    """
    for value in values:
        if not isinstance(value, str):
            raise DataError(
                f"{data.source}: column {column!r} holds {short(value)} ({type(value).__name__}), expected text in "
                f"every row; drop or convert such rows"
            )
    return values


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _pair(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _alpaca(columns: Mapping[str, list[Any]], data: DataConfig) -> list[list[Message]]:
    """Instruction and input are what is asked, two lines apart; `history` has earlier pairs, where it is there."""
    instructions = texts(columns["instruction"], "instruction", data)
    outputs = texts(columns["output"], "output", data)
    found = []
    for i, inputs in enumerate(_optional(columns, "input", data)):
        asked = f"{instructions[i]}\n\n{inputs}" if inputs.strip() else instructions[i]
        earlier: list[Message] = []
        for pair in columns["history"][i] or () if "history" in columns else ():
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"{data.source}: column 'history' holds {short(pair)}, expected pairs of texts")
            earlier += _pair(*texts(pair, "history", data))
        found.append([*earlier, *_pair(asked, outputs[i])])
    return found


def _optional(columns: Mapping[str, list[Any]], column: str, data: DataConfig) -> list[str]:
    """A column of texts that need not be there, nor be filled in every row."""
    count = len(next(iter(columns.values())))
    return texts(["" if value is None else value for value in columns.get(column, [None] * count)], column, data)


def _messages(value: Any, column: str, data: DataConfig) -> list[Message]:
    """A list of messages, with role and content or with ShareGPT's from and value; what else they hold stays."""
    return [_message(message, column, data) for message in (value if isinstance(value, list) else [value])]


def _message(message: Any, column: str, data: DataConfig) -> Message:
    given = {key: _filled(item) for key, item in message.items() if item is not None} if _is_map(message) else {}
    role, content = given.pop("role", None), _joined(given.pop("content", None))
    if role is None and "from" in given:
        speaker, content = given.pop("from"), given.pop("value", None)
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise DataError(
                f"{data.source}: column {column!r} has a message from {speaker!r}{suggest(str(speaker), _SPEAKERS)}"
            )
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{data.source}: column {column!r} holds {short(message)}, expected a list of "
            f"{{'role': ..., 'content': ...}} or {{'from': ..., 'value': ...}} with texts"
        )
    return {"role": role, "content": content, **given}


def _joined(content: Any) -> Any:
    """The text of a content that is a list of texts, as multimodal sets have it."""
    if isinstance(content, list) and all(_is_map(part) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _filled(value: Any) -> Any:
    """A value without the empty fields that a table gives to every record which lacks them."""
    if _is_map(value):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _under(messages: list[Message], system: str, own: bool = False) -> list[Message]:
    """The conversation under a system prompt; in place of its own system message, or only where it has none (`own`)."""
    has_one = bool(messages) and messages[0]["role"] == "system"
    if not system or (has_one and own):
        return messages
    return [{"role": "system", "content": system}, *messages[has_one:]]


def _to_last_answer(messages: list[Message]) -> list[Message]:
    """Templates may render a turn otherwise once another follows: the last one to be learned is the last."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def _tools(value: Any, data: DataConfig) -> list[Any]:
    """Descriptions of functions, as a list or as its JSON."""
    listed = value
    if isinstance(value, str):
        try:
            listed = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{data.source}: column 'tools' holds {short(value)}, which is no JSON: {error}") from None
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(_is_map(tool) and tool_name(tool) for tool in listed):
        raise DataError(
            f"{data.source}: column 'tools' holds {short(value)}, expected a list of functions, each with a name"
        )
    return [_filled(tool) for tool in listed]


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a function, whether or not it is wrapped as {"type": "function", "function": ...}."""
    inner = tool.get("function")
    return str((inner if isinstance(inner, Mapping) else tool).get("name") or "")
