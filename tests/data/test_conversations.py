"""Alpaca, ShareGPT and messages with tools become the conversations that they are; nothing is dropped in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fedlora.common.errors import DataError
from fedlora.config import DataConfig
from fedlora.data import encode
from fedlora.data.conversations import conversation
from fedlora.tasks.causal_lm import CausalLM
from tests.data.conftest import CHATML, wrap

DATA = DataConfig(source="mine.jsonl", max_length=4096)
TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
CALLS = CHATML.replace("m['content'] +", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '') +")


def read(rows: dict[str, list[Any]], form: str, data: DataConfig = DATA) -> list[list[tuple[str, str]]]:
    """Roles and contents, after a way through a table as any source has it."""
    found = [conversation(row, form, data) for row in Dataset.from_dict(rows).to_list()]
    return [[(m["role"], m["content"]) for m in one.messages] for one in found]


def seen(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """All that the model sees of the one row, and what it learns of it."""
    (example,) = encode(Dataset.from_dict(rows), tokenizer, DATA, CausalLM())
    assert isinstance(example["labels"], list)
    return (
        str(tokenizer.decode(example["input_ids"])),
        str(tokenizer.decode([label for label in example["labels"] if label != -100])),
    )


def test_alpaca() -> None:
    rows = {"instruction": ["Add", "Say hi"], "input": ["1 and 2", " "], "output": ["3", "hi"]}
    assert read(rows, "alpaca") == [
        [("user", "Add\n\n1 and 2"), ("assistant", "3")],
        [("user", "Say hi"), ("assistant", "hi")],
    ]
    assert read({"instruction": ["Say hi"], "output": ["hi"]}, "alpaca") == [[("user", "Say hi"), ("assistant", "hi")]]
    more = {"system": ["Be kind", None], "history": [[["a", "b"]], None], **(rows | {"input": [None, None]})}
    assert read(more, "alpaca") == [
        [("system", "Be kind"), ("user", "a"), ("assistant", "b"), ("user", "Add"), ("assistant", "3")],
        [("user", "Say hi"), ("assistant", "hi")],
    ]


def test_sharegpt_with_system_and_tool_turns() -> None:
    turns = [
        ("system", "Be kind"),
        ("human", "Weather?"),
        ("function_call", '{"name": "look"}'),
        ("observation", "rain"),
        ("gpt", "It rains."),
    ]
    rows = {"conversations": [[{"from": speaker, "value": text} for speaker, text in turns]]}
    expected = ["system", "user", "assistant", "tool", "assistant"]
    assert read(rows, "sharegpt") == [[(role, text) for role, (_, text) in zip(expected, turns, strict=True)]]
    own = {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]], "system": ["Be brief"]}
    assert read(own, "sharegpt")[0][0] == ("system", "Be brief")
    assert read(rows | {"system": ["Be brief"]}, "sharegpt")[0][0] == ("system", "Be kind")
    assert read(own, "sharegpt", replace(DATA, system_prompt="Be loud"))[0][0] == ("system", "Be loud")


def test_columns_are_recognised_and_every_answer_is_learned(chatml: PreTrainedTokenizerFast) -> None:
    turns = [("human", "hi"), ("gpt", "hello"), ("tool", "rain"), ("gpt", "it rains"), ("human", "bye")]
    whole, learned = seen({"conversations": [[{"from": who, "value": text} for who, text in turns]]}, chatml)
    assert learned == "hello<|im_end|>it rains<|im_end|>"
    assert "<|im_start|>tool\nrain<|im_end|>" in whole
    whole, learned = seen({"instruction": ["Add"], "input": ["1 2"], "output": ["3"]}, chatml)
    assert learned == "3<|im_end|>"
    assert "<|im_start|>user\nAdd\n\n1 2<|im_end|>" in whole


def test_messages_may_come_in_either_words(chatml: PreTrainedTokenizerFast) -> None:
    plain = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
    sharegpt = {"messages": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]}
    parts = {
        "messages": [
            [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ]
        ]
    }
    assert seen(plain, chatml) == seen(sharegpt, chatml) == seen(parts, chatml)


def test_tool_calls_are_what_the_assistant_says(byte_level: Any, chatml: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "name": "look"},
        {"role": "assistant", "content": "It rains."},
    ]
    whole, learned = seen({"messages": [messages]}, wrap(byte_level, CALLS))
    assert learned == f"{json.dumps([call], sort_keys=False)}<|im_end|>It rains.<|im_end|>"
    assert "None" not in whole
    assert "null" not in whole
    with pytest.raises(DataError, match="row 1: the tokenizer's chat template leaves out the tool calls;"):
        seen({"messages": [messages]}, chatml)


def test_tools_reach_the_template_or_are_refused(byte_level: Any, chatml: PreTrainedTokenizerFast) -> None:
    rows: dict[str, list[Any]] = {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]}
    tools = [{"name": "look", "parameters": {"type": "object"}}]
    whole, learned = seen(rows | {"tools": [json.dumps(tools)]}, wrap(byte_level, TOOLS + CHATML))
    assert '"name": "look"' in whole
    assert learned == "b<|im_end|>"
    assert seen(rows | {"tools": [tools]}, wrap(byte_level, TOOLS + CHATML))[0] == whole
    for none in ("", "[]", None):
        assert seen(rows | {"tools": [none]}, chatml) == seen(rows, chatml)
    with pytest.raises(DataError, match="template leaves out the tools;"):
        seen(rows | {"tools": [tools]}, chatml)


@pytest.mark.parametrize(
    ("rows", "form", "message"),
    [
        (
            {"conversations": [[{"from": "narrator", "value": "a"}]]},
            "sharegpt",
            r"'conversations' has a message whose 'from' is text of 8 characters, expected one of",
        ),
        (
            {"conversations": [[{"from": "gpt", "value": None}]]},
            "sharegpt",
            r"whose 'content' is nothing \(null\)",
        ),
        ({"conversations": ["hello"]}, "sharegpt", r"'conversations' holds text of 5 characters, expected a list"),
        ({"instruction": [3], "output": ["a"]}, "alpaca", r"'instruction' holds a number, expected text"),
        ({"instruction": ["a"], "output": [None]}, "alpaca", r"'output' holds nothing \(null\)"),
        ({"instruction": ["a"], "output": ["b"], "input": [3]}, "alpaca", r"'input' holds a number"),
        (
            {"instruction": ["a"], "output": ["b"], "history": [[["a"]]]},
            "alpaca",
            r"'history' holds a list of 1",
        ),
        ({"messages": [[]], "tools": ["{"]}, "chat", r"'tools' holds text of 1 characters, which is not valid JSON"),
        ({"messages": [[]], "tools": ['["look"]']}, "chat", r"'tools' holds .*expected a list of functions"),
    ],
)
def test_what_is_no_conversation_is_named(rows: dict[str, list[Any]], form: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(rows, form)
    assert not any(word in str(caught.value) for word in ("narrator", "hello", "look"))
