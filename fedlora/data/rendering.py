"""Conversations as text, rendered by a tokenizer's chat template, and the places of the assistant's turns in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import DataError, suggest
from fedlora.config import DataConfig

from .conversations import Conversation, Message, RowError, tool_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant", "tool", "developer")
# Exceptions that a template's expressions may raise for a row for which the template was not made.
_OF_A_TEMPLATE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_SHOWN, _LONGEST = 12, 160  # largest number of roles, and of characters of the template's message, in an error


class Template:
    """Renders conversations with a tokenizer's chat template, or as "prompt\\nresponse" if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        """Choose the template that `data.chat-template` names, or the default one.

        Raises:
            DataError: the tokenizer has no template of this name, or has several and no default.
        """
        self.tokenizer = tokenizer
        self._name = data.chat_template or None
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if self._name and self._name not in named:
            known = suggest(self._name, named) if named else "; this tokenizer has no named templates, leave it out"
            raise DataError(f"data.chat-template = {self._name!r}{known}")
        if named and not self._name and "default" not in named:
            names = ", ".join(map(repr, sorted(named)))
            raise DataError(
                f"the tokenizer has named chat templates but no default; choose one of {names} as data.chat-template"
            )

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] = (), open_turn: bool = False) -> str:
        """The conversation as text; with `open_turn`, the beginning of the assistant's next turn is added."""
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
    """The rendered conversation, and the assistant's turns in it, each as (first character, end).

    Raises:
        RowError: the template refuses the conversation or leaves out its tools, or nothing in it can be learned.
    """
    from jinja2 import TemplateError

    messages = chat.messages
    found = []
    text = ""
    try:
        text = render(messages, chat.tools)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue  # an assistant's message without a prompt before it is context
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
            "(some open a <think> and leave it out again); write the conversations as texts (data.form = 'text'), or "
            "use a model with another template"
        )
    _check_tools(chat, text)
    return text, found


def _check_tools(chat: Conversation, text: str) -> None:
    """Raise RowError if the template leaves out tools, as templates do that know no tools."""
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    for what, named in (("tools", chat.tools), ("tool calls", calls)):
        if any(tool_name(tool) not in text for tool in named):
            raise RowError(
                f"the tokenizer's chat template leaves out the {what}; use a model whose template writes them, or put "
                "them into the messages' text"
            )


def _turn_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The end of the last turn: after its end token, before the white space that templates add after it."""
    ends = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    trimmed = text.rstrip()
    return len(trimmed) if trimmed.endswith(ends) else len(text)
