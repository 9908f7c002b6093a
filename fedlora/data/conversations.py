"""From rows to conversations: the shapes that people's data has, as the messages that chat templates take.

No message quotes what a row holds: it would end in logs, and on servers.
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


class RowError(DataError):
    """What is wrong with a row, in words that do not quote it; whoever knows where the row stands adds that."""


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
        """What the assistant says after another one; a call of a tool is something that it says."""
        return [
            message["content"] or ("(a call)" if message.get("tool_calls") else "")
            for message in self.messages[1:]
            if message["role"] == "assistant"
        ]


def conversation(row: Mapping[str, Any], form: str, data: DataConfig) -> Conversation:
    """What one row holds.

    Args:
        row: all of its columns.
        form: "prompt", "chat", "alpaca" or "sharegpt".
        data: names of the columns, and the system prompt.

    Raises:
        RowError: a value is no text, or no list of messages.
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
    """A cell that is text.

    Raises:
        RowError: it is not.
    """
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {described(value)}, expected text; drop or convert such rows")
    return value


def described(value: Any) -> str:
    """What a value is, in place of the value itself, which is its owner's alone."""
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
    """Instruction and input are what is asked, two lines apart; `history` has earlier pairs, where it is there."""
    asked, inputs = text(row, "instruction"), _optional(row, "input")
    earlier: list[Message] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise RowError(f"column 'history' holds {described(pair)}, expected pairs of texts")
        earlier += _pair(*pair)
    return [*earlier, *_pair(f"{asked}\n\n{inputs}" if inputs.strip() else asked, text(row, "output"))]


def _optional(row: Mapping[str, Any], column: str) -> str:
    """A text that need not be there."""
    return "" if row.get(column) is None else text(row, column)


def _message(message: Any, column: str) -> Message:
    """With role and content, or with ShareGPT's from and value; what else it holds stays."""
    given = {key: _filled(item) for key, item in message.items() if item is not None} if _is_map(message) else {}
    role, content = given.pop("role", None), _joined(given.pop("content", None))
    if role is None and "from" in given:
        speaker, content = given.pop("from"), given.pop("value", None)
        role = _SPEAKERS.get(str(speaker).lower())
        if role is None:
            raise RowError(
                f"column {column!r} has a message whose 'from' is {described(speaker)}, and none of "
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


def _tools(value: Any) -> list[Any]:
    """Descriptions of functions, as a list or as its JSON."""
    listed = value
    if isinstance(value, str):
        try:
            listed = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise RowError(f"column 'tools' holds {described(value)}, which is no JSON: {error}") from None
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(_is_map(tool) and tool_name(tool) for tool in listed):
        raise RowError(f"column 'tools' holds {described(listed)}, expected a list of functions, each with a name")
    return [_filled(tool) for tool in listed]


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a function, whether or not it is wrapped as {"type": "function", "function": ...}."""
    inner = tool.get("function")
    return str((inner if isinstance(inner, Mapping) else tool).get("name") or "")
