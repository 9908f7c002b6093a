"""Conversations as text, by a tokenizer's chat template, and where in it the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import DataError, suggest
from fedlora.config import DataConfig

from .conversations import Conversation, Message, RowError, tool_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant", "tool", "developer")
# What a template's own expressions may raise of a row that it was not made for.
_OF_A_TEMPLATE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_SHOWN, _LONGEST = 12, 160  # roles, and characters of the template's own words


class Template:
    """How a tokenizer writes conversations: by its chat template, or by "prompt\\nresponse" where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        """Choose it.

        Raises:
            DataError: the tokenizer has several by name, and `data.chat-template` is none of them; or it has one alone.
        """
        self.tokenizer = tokenizer
        self._name = data.chat_template or None
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if self._name and self._name not in named:
            known = suggest(self._name, named) if named else "; this tokenizer has no templates by name, leave it out"
            raise DataError(f"data.chat-template = {self._name!r}{known}")
        if named and not self._name and "default" not in named:
            names = ", ".join(map(repr, sorted(named)))
            raise DataError(
                f"the tokenizer has chat templates by name and no default; choose one of {names} as data.chat-template"
            )

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] = (), open_turn: bool = False) -> str:
        """The conversation as text; `open_turn` adds what the assistant's next turn starts with."""
        if self.tokenizer.chat_template:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=list(tools) or None,  # pyright: ignore[reportArgumentType] - descriptions, no functions
                    chat_template=self._name,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                )
            )
        end = str(self.tokenizer.eos_token or "")
        return "".join(m["content"] + (end if m["role"] == "assistant" else "\n") for m in messages)


def spans(chat: Conversation, render: Template) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it (characters, end exclusive) the assistant's turns stand.

    Raises:
        RowError: the template refuses it, leaves out its tools, or nothing of it can be learned.
    """
    from jinja2 import TemplateError

    messages = chat.messages
    found = []
    text = ""
    try:
        text = render(messages, chat.tools)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue  # what no prompt comes before is context
            head = render(messages[:i], chat.tools, open_turn=True)
            upto = text if i + 1 == len(messages) else render(messages[: i + 1], chat.tools)
            if text.startswith(upto) and upto.startswith(head):
                end = _turn_end(upto, render.tokenizer)
                found += [(len(head), end)] if end > len(head) else []
    except (TemplateError, *_OF_A_TEMPLATE) as error:
        roles = ", ".join(m["role"] if m["role"] in _ROLES else "(another)" for m in messages[:_SHOWN])
        raise RowError(f"the tokenizer's chat template refuses the roles {roles}: {str(error)[:_LONGEST]}") from None
    if not found:
        raise RowError(
            "nothing to learn: the tokenizer's chat template does not continue the prompt when it renders the response "
            "(some open a <think> that they leave out again); write conversations out as data.form = 'text', or take a "
            "model with another template"
        )
    _check_tools(chat, text)
    return text, found


def _check_tools(chat: Conversation, text: str) -> None:
    """A template that knows no tools leaves them out without a word."""
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    for what, named in (("tools", chat.tools), ("tool calls", calls)):
        if any(tool_name(tool) not in text for tool in named):
            raise RowError(
                f"the tokenizer's chat template leaves out the {what}; take a model whose template writes them, or put "
                "them into the messages' text"
            )


def _turn_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the last turn ends: after its end token, not after the white space that templates put behind it."""
    ends = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    trimmed = text.rstrip()
    return len(trimmed) if trimmed.endswith(ends) else len(text)
