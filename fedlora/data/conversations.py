"""Converts rows of several common forms to conversations: lists of messages, as chat templates take them.

No error message quotes a row, since messages get into logs and to servers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

Message = Mapping[str, Any]

# Columns with text in form alpaca, and besides the messages in form sharegpt.
TEXT_COLUMNS = ("instruction", "input", "output", "system", "tools")
# Names of speakers in ShareGPT's `from` -> roles of chat templates.
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


class RowError(DataError):
    """A fault of a row, described without quoting it. The caller adds the row's place."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, as chat templates take it.

    Args:
        messages: messages with "role" and "content", up to the assistant's last turn; later ones would not be used.
        tools: descriptions of functions that the assistant may call.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] = ()

    @property
    def answers(self) -> list[str]:
        """The assistant's messages that follow another message; a call of a tool counts as a text."""
        return [
            message["content"] or ("(a call)" if message.get("tool_calls") else "")
            for message in self.messages[1:]
            if message["role"] == "assistant"
        ]


def conversation(row: Mapping[str, Any], form: str, data: DataConfig) -> Conversation:
    """The conversation in one row.

    Args:
        row: all columns of the row.
        form: "prompt", "chat", "alpaca" or "sharegpt".
        data: the section data, with the names of the columns and the system prompt.

    Raises:
        RowError: a value is not a text, or not a list of messages.
    """
    if form == "prompt":
        messages = _pair(text(row, data.prompt_column), text(row, data.response_column))
    elif form == "alpaca":
        messages = _alpaca(row)
    else:
        column = data.messages_column if form == "chat" else "conversations"
        value = row[column]
        messages = [_message(message, column) for message in (value if isinstance(value, list) else [value])]
    if form in ("alpaca", "sharegpt"):
        messages = _under(messages, _optional(row, "system"), own=True)
    tools = _tools(row.get("tools")) if form in ("chat", "sharegpt") else []
    return Conversation(_to_last_answer(_under(messages, data.system_prompt)), tools)


def text(row: Mapping[str, Any], column: str) -> str:
    """The text in a cell.

    Raises:
        RowError: the cell holds something else.
    """
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {described(value)}, expected text; drop or convert such rows")
    return value


def described(value: Any) -> str:
    """The kind of a value, for messages, which must not quote the value itself."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int | float):
        return "a number"
    return "an object" if _is_map(value) else f"a value of type {type(value).__name__}"


def _pair(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row of form alpaca: the pairs of `history`, if any, then instruction, input and output."""
    asked, inputs = text(row, "instruction"), _optional(row, "input")
    earlier: list[Message] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise RowError(f"column 'history' holds {described(pair)}, expected pairs of texts")
        earlier += _pair(*pair)
    return [*earlier, *_pair(f"{asked}\n\n{inputs}" if inputs.strip() else asked, text(row, "output"))]


def _optional(row: Mapping[str, Any], column: str) -> str:
    """The text in a cell; empty if the row lacks it."""
    return "" if row.get(column) is None else text(row, column)


def _message(message: Any, column: str) -> Message:
    """A message with role and content, also from ShareGPT's from and value; its other fields are kept."""
    given = {key: _filled(item) for key, item in message.items() if item is not None} if _is_map(message) else {}
    role, content = given.pop("role", None), _joined(given.pop("content", None))
    if role is None and "from" in given:
        speaker, content = given.pop("from"), given.pop("value", None)
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise RowError(
                f"column {column!r} has a message whose 'from' is {described(speaker)}, expected one of "
                f"{', '.join(_SPEAKERS)}"
            )
    if content is None and given.get("tool_calls"):
        content = ""
    for name, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            found = f"a message whose {name!r} is {described(value)}" if _is_map(message) else described(message)
            raise RowError(
                f"column {column!r} holds {found}, expected a list of {{'role': ..., 'content': ...}} or "
                f"{{'from': ..., 'value': ...}} with texts"
            )
    return {"role": role, "content": content, **given}


def _joined(content: Any) -> Any:
    """The text of a content that is a list of texts, as in multimodal data sets."""
    if isinstance(content, list) and all(_is_map(part) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _filled(value: Any) -> Any:
    """A value without empty fields, which a table adds to every record that lacks them."""
    if _is_map(value):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _under(messages: list[Message], system: str, own: bool = False) -> list[Message]:
    """The conversation with this system prompt in place of its own system message; with `own`, its own one is kept."""
    has_one = bool(messages) and messages[0]["role"] == "system"
    if not system or (has_one and own):
        return messages
    return [{"role": "system", "content": system}, *messages[has_one:]]


def _to_last_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the assistant's last one, since templates may render a turn differently if others follow."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def _tools(value: Any) -> list[Any]:
    """Descriptions of functions, given as a list or as the list's JSON."""
    listed = value
    if isinstance(value, str):
        try:
            listed = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise RowError(f"column 'tools' holds {described(value)}, which is not valid JSON: {error}") from None
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(_is_map(tool) and tool_name(tool) for tool in listed):
        raise RowError(f"column 'tools' holds {described(listed)}, expected a list of functions, each with a name")
    return [_filled(tool) for tool in listed]


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a function, whether or not it is wrapped as {"type": "function", "function": ...}."""
    inner = tool.get("function")
    return str((inner if isinstance(inner, Mapping) else tool).get("name") or "")
