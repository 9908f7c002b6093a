"""The loss is taken of the response and its end token alone, whatever the tokenizer, the template and the length."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedlora.common.errors import DataError
from fedlora.config import DataConfig
from fedlora.data import Example, RowReader, encode, form_of, usable_rows
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from tests.data.conftest import CHATML, wrap

DATA = DataConfig(source="mine.jsonl", max_length=4096)
CAUSAL = CausalLM()
texts = st.text(st.sampled_from("ab hello\n\t.,é🙂?"), max_size=20)
answers = texts.filter(str.strip)


def pairs(*rows: tuple[str, str]) -> Dataset:
    return Dataset.from_dict({"prompt": [p for p, _ in rows], "response": [r for _, r in rows]})


def chat(*contents: str, first: str = "user") -> Dataset:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Dataset.from_dict({"messages": [messages]})


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)
    return caplog


def learned(example: Example) -> list[int]:
    assert isinstance(example["labels"], list)
    assert len(example["labels"]) == len(example["input_ids"])
    assert all(label in (-100, token) for label, token in zip(example["labels"], example["input_ids"], strict=True))
    return [label for label in example["labels"] if label != -100]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def prompt_ids(example: Example) -> list[int]:
    assert isinstance(example["labels"], list)
    return example["input_ids"][: next(i for i, label in enumerate(example["labels"]) if label != -100)]


@settings(max_examples=60, deadline=None)
@given(prompt=texts, response=answers)
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_learns_the_response_and_the_end_token(
    name: str, prompt: str, response: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(name)
    (example,) = encode(pairs((prompt, response)), tokenizer, DATA, CAUSAL)
    assert text_of(tokenizer, learned(example)) == response + "<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(prompt=texts, response=answers)
def test_context_is_the_prompt_as_it_is_tokenized_for_generation(
    chatml: PreTrainedTokenizerFast, prompt: str, response: str
) -> None:
    (example,) = encode(pairs((prompt, response)), chatml, DATA, CAUSAL)
    alone = chatml.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids(example) == alone


def test_a_token_across_the_boundary_is_split(chatml: PreTrainedTokenizerFast) -> None:
    assert len(chatml("\n\n")["input_ids"]) == 1
    (example,) = encode(pairs(("hi", "\nhello")), chatml, DATA, CAUSAL)
    assert example["input_ids"][: -len(learned(example))][-1] == chatml("\n")["input_ids"][0]
    assert text_of(chatml, learned(example)) == "\nhello<|im_end|>"


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(answers, min_size=2, max_size=6))
def test_learns_every_assistant_turn(chatml: PreTrainedTokenizerFast, contents: list[str]) -> None:
    (example,) = encode(chat(*contents), chatml, DATA, CAUSAL)
    expected = "".join(content + "<|im_end|>" for content in contents[1::2])
    assert text_of(chatml, learned(example)) == expected


def test_pairs_and_chats_are_the_same_examples(chatml: PreTrainedTokenizerFast) -> None:
    assert encode(pairs(("hi", "hello")), chatml, DATA, CAUSAL) == encode(chat("hi", "hello"), chatml, DATA, CAUSAL)


def test_a_turn_without_a_prompt_is_context(chatml: PreTrainedTokenizerFast) -> None:
    (example,) = encode(chat("welcome", "hi", "hello", first="assistant"), chatml, DATA, CAUSAL)
    assert text_of(chatml, learned(example)) == "hello<|im_end|>"
    assert "welcome" in text_of(chatml, prompt_ids(example))


def test_turns_that_the_template_rewrites_are_context(byte_level: Any) -> None:
    drops_early_thoughts = CHATML.replace(
        "m['content'] +",
        "(m['content'].split('!')[-1] if m['role'] == 'assistant' and not loop.last else m['content']) +",
    )
    tokenizer = wrap(byte_level, drops_early_thoughts)
    (example,) = encode(chat("a", "think!b", "c", "think!d"), tokenizer, DATA, CAUSAL)
    assert text_of(tokenizer, learned(example)) == "think!d<|im_end|>"
    assert "think!b" not in text_of(tokenizer, example["input_ids"])


def test_word_marks_stay_those_of_the_whole_text(sentencepiece_like: PreTrainedTokenizerFast) -> None:
    tokenizer = sentencepiece_like
    (example,) = encode(pairs(("how are you?", "I am fine, thank you!")), tokenizer, DATA, CAUSAL)
    messages = [
        {"role": "user", "content": "how are you?"},
        {"role": "assistant", "content": "I am fine, thank you!"},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(example["input_ids"])] == example["input_ids"]
    assert text_of(tokenizer, learned(example)).replace(" ", "") == "Iamfine,thankyou!<|im_end|>"


def test_no_template_joins_by_a_newline(plain: PreTrainedTokenizerFast) -> None:
    (example,) = encode(pairs(("how are", "you today")), plain, DATA, CAUSAL)
    assert text_of(plain, example["input_ids"]) == "how are\nyou today<|im_end|>"


def test_system_prompt_comes_first_and_once(chatml: PreTrainedTokenizerFast) -> None:
    data = replace(DATA, system_prompt="Be brief")
    own = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    rows = Dataset.from_dict({"messages": [own, own[1:]]})
    with_own, without = encode(rows, chatml, data, CAUSAL)
    assert with_own == without
    decoded = text_of(chatml, without["input_ids"])
    assert decoded.startswith("<|im_start|>system\nBe brief<|im_end|>")
    assert decoded.count("system") == 1
    assert encode(rows, chatml, DATA, CAUSAL)[1] != without


@settings(max_examples=80, deadline=None)
@given(prompt=st.integers(0, 60), response=st.integers(1, 60), length=st.integers(4, 60))
def test_truncation_keeps_response_tokens(
    chatml: PreTrainedTokenizerFast, prompt: int, response: int, length: int
) -> None:
    rows = pairs((" hello" * prompt, " hello" * response))
    (whole,) = encode(rows, chatml, DATA, CAUSAL)
    (cut,) = encode(rows, chatml, replace(DATA, max_length=length), CAUSAL)
    assert len(cut["input_ids"]) == min(length, len(whole["input_ids"]))
    assert len(learned(cut)) >= min(length // 4, len(learned(whole)))  # half of what the system prompt leaves
    assert learned(whole)[: len(learned(cut))] == learned(cut)
    assert isinstance(cut["labels"], list)
    assert cut["labels"][0] == -100


def test_a_long_prompt_loses_its_start_not_its_response(chatml: PreTrainedTokenizerFast) -> None:
    (example,) = encode(pairs((" hello" * 500 + " today?", "fine")), chatml, replace(DATA, max_length=32), CAUSAL)
    assert text_of(chatml, learned(example)) == "fine<|im_end|>"
    assert "today?<|im_end|>\n<|im_start|>assistant\n" in text_of(chatml, example["input_ids"])


def test_text_learns_every_token_and_the_end(plain: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": ["hello there", "hello" * 50]})
    short, long = encode(rows, plain, replace(DATA, max_length=16), CAUSAL)
    assert learned(short) == short["input_ids"]
    assert text_of(plain, short["input_ids"]) == "hello there<|im_end|>"
    assert len(long["input_ids"]) == 16
    assert long["input_ids"][-1] != plain.eos_token_id


def test_text_does_not_double_an_end_token_that_the_text_has(plain: PreTrainedTokenizerFast) -> None:
    (example,) = encode(Dataset.from_dict({"text": ["hello<|im_end|>"]}), plain, DATA, CAUSAL)
    assert [token == plain.eos_token_id for token in example["input_ids"]].count(True) == 1


def test_label(plain: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": ["hello", "you " * 99], "label": [1, 0]})
    one, two = encode(rows, plain, replace(DATA, max_length=8), Classification())
    assert (one["labels"], two["labels"]) == (1, 0)
    assert text_of(plain, one["input_ids"]) == "hello"
    assert len(two["input_ids"]) == 8


def test_named_classes_are_numbers(plain: PreTrainedTokenizerFast) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": ["c", "a"]}, features=features)
    assert [example["labels"] for example in encode(rows, plain, DATA, Classification(3))] == [2, 0]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, 2], r"'label' holds classes outside 0 to 1 in row 3; correct these rows, or set model\.labels"),
        ([0, 1, -1], r"'label' holds classes outside 0 to 1 in row 3"),
        ([1, 2, 1], r"'label' counts its classes from 1 to 2, but classes count from 0; subtract 1"),
        ([0.0, 1.5, 1.0], r"'label' holds a number that is not whole in row 2, expected a class from 0 to 1"),
        (["0", "1", "secret"], r"'label' holds text of 1 characters in rows 1, 2 and 3, expected a class from 0 to 1"),
    ],
)
def test_label_out_of_range(plain: PreTrainedTokenizerFast, labels: list[Any], says: str) -> None:
    rows = Dataset.from_dict({"text": ["hello", "there", "you"], "label": labels})
    with pytest.raises(DataError, match=says):
        encode(rows, plain, DATA, Classification())


def test_a_blank_label_is_no_class(plain: PreTrainedTokenizerFast, log: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"text": ["hello", "there", None], "label": [1.0, None, 0.0]})
    assert [example["labels"] for example in encode(rows, plain, DATA, Classification())] == [1]
    assert (
        "2 of 3 rows have nothing to predict and are left out: a blank text (row 3); a blank label (row 2)" in log.text
    )


def test_more_names_than_classes_are_refused(plain: PreTrainedTokenizerFast) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": ["b", "a"]}, features=features)
    with pytest.raises(DataError, match=r"has 3 different names, but model\.labels = 2; set model\.labels"):
        encode(rows, plain, DATA, Classification())


def test_no_rows_no_examples(plain: PreTrainedTokenizerFast) -> None:
    assert encode(Dataset.from_dict({"text": []}), plain, DATA, CAUSAL) == []


@pytest.mark.parametrize(
    ("columns", "task", "form"),
    [
        (["prompt", "response", "topic"], CAUSAL, "prompt"),
        (["messages", "prompt", "response"], CAUSAL, "chat"),
        (["text", "label"], CAUSAL, "text"),
        (["text", "label"], Classification(), "label"),
        (["instruction", "input", "output", "text"], CAUSAL, "alpaca"),
        (["instruction", "output"], CAUSAL, "alpaca"),
        (["id", "conversations", "system", "tools"], CAUSAL, "sharegpt"),
    ],
)
def test_auto_form(columns: list[str], task: RowReader, form: str) -> None:
    assert form_of(columns, DATA, task) == form


@pytest.mark.parametrize(
    ("columns", "form", "task", "message"),
    [
        (["question", "answer"], "auto", CAUSAL, r"mine\.jsonl: .*'question', 'answer'.*data\.prompt-column"),
        (["prompt", "answer"], "prompt", CAUSAL, r"mine\.jsonl: no column 'response'.*'prompt', 'answer'"),
        (["text", "stars"], "auto", Classification(), r"no column 'label'.*'text', 'stars'"),
        (
            ["text", "label"],
            "label",
            CAUSAL,
            r"'label' does not fit model\.task, which takes the form 'chat' or 'prompt'",
        ),
        (["text", "label"], "text", Classification(), r"'text' does not fit model\.task, which takes the form 'label'"),
    ],
)
def test_wrong_columns(columns: list[str], form: str, task: RowReader, message: str) -> None:
    with pytest.raises(DataError, match=message):
        form_of(columns, replace(DATA, form=form), task)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"prompt": ["a"], "response": [None]},
            r"mine\.jsonl: row 1: column 'response' holds nothing \(null\), expected text",
        ),
        ({"prompt": [3], "response": ["a"]}, r"'prompt' holds a number"),
        ({"text": ["  ", ""]}, r"none of 2 rows has anything to predict: a blank text \(rows 1 and 2\)"),
        ({"messages": ["hello"]}, r"'messages' holds text of 5 characters, expected a list"),
        ({"messages": [[{"role": "user", "content": None}]]}, r"'content' is nothing \(null\), expected a list"),
        (
            {"messages": [[{"role": "user", "content": "a"}]]},
            r"none of 1 rows .*: no assistant's message .* \(row 1\)",
        ),
        ({"messages": [[]]}, r"none of 1 rows .*: an empty list of messages \(row 1\)"),
        ({"prompt": ["a"], "response": [" "]}, r"none of 1 rows .*: an empty answer \(row 1\)"),
        (
            {"messages": [[{"role": "assistant", "content": "a"}]]},
            r"none of 1 rows .*: no assistant's message .* \(row 1\)",
        ),
    ],
)
def test_wrong_values(chatml: PreTrainedTokenizerFast, rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(Dataset.from_dict(rows), chatml, DATA, CAUSAL)


def test_a_template_that_refuses_the_roles_is_named(byte_level: Any) -> None:
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    data = replace(DATA, system_prompt="Be brief")
    with pytest.raises(DataError, match=r"row 1: .* refuses the roles system, user, assistant: no system role"):
        encode(pairs(("a", "b")), wrap(byte_level, picky), data, CAUSAL)


def test_a_template_that_fails_on_a_row_is_named_with_it(byte_level: Any) -> None:
    tokenizer = wrap(byte_level, "{{ 1 // (messages[0]['content'] | length - 6) }}" + CHATML)
    with pytest.raises(
        DataError, match=r"mine\.jsonl: row 2: .* refuses the roles user, assistant: integer div"
    ) as said:
        encode(pairs(("a", "b"), ("secret", "b")), tokenizer, DATA, CAUSAL)
    assert "secret" not in str(said.value)


def test_a_template_that_does_not_continue_the_prompt_is_refused(byte_level: Any) -> None:
    odd = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(DataError, match=r"nothing to learn: .* <think> .*data\.form = 'text'"):
        encode(pairs(("a", "b")), wrap(byte_level, odd), DATA, CAUSAL)


def test_what_follows_the_last_answer_does_not_change_it(byte_level: Any) -> None:
    """The template drops the thoughts of all turns but the last; a question without an answer is no last turn."""
    drops_early_thoughts = CHATML.replace(
        "m['content'] +",
        "(m['content'].split('!')[-1] if m['role'] == 'assistant' and not loop.last else m['content']) +",
    )
    tokenizer = wrap(byte_level, drops_early_thoughts)
    (example,) = encode(chat("a", "think!b", "c"), tokenizer, DATA, CAUSAL)
    assert text_of(tokenizer, learned(example)) == "think!b<|im_end|>"


@pytest.mark.parametrize("left", [[], ["default"], ["rag", "tool_use"]])
def test_templates_by_name(byte_level: Any, left: list[str]) -> None:
    named = {"rag": CHATML.replace("Be kind", "Use the text"), **dict.fromkeys(left, CHATML)}
    tokenizer = wrap(byte_level, named)
    (chosen,) = encode(pairs(("a", "b")), tokenizer, replace(DATA, chat_template="rag"), CAUSAL)
    assert ("Use the text" in text_of(tokenizer, chosen["input_ids"])) == ("rag" not in left)
    if "default" in left:
        (usual,) = encode(pairs(("a", "b")), tokenizer, DATA, CAUSAL)
        assert "Be kind" in text_of(tokenizer, usual["input_ids"])
    else:
        with pytest.raises(
            DataError, match=r"named chat templates but no default; choose one of 'rag'.* as data\.chat-template"
        ):
            encode(pairs(("a", "b")), tokenizer, DATA, CAUSAL)
    with pytest.raises(DataError, match=r"data\.chat-template = 'rags'; did you mean 'rag'\?"):
        encode(pairs(("a", "b")), tokenizer, replace(DATA, chat_template="rags"), CAUSAL)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_template_is_named_where_none_has_a_name(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DataError, match=r"data\.chat-template = '\{\{ 1 \}\}'; this tokenizer has no named templates"):
        encode(pairs(("a", "b")), request.getfixturevalue(name), replace(DATA, chat_template="{{ 1 }}"), CAUSAL)


def test_rows_with_nothing_to_predict_are_counted_and_left_out(
    plain: PreTrainedTokenizerFast, log: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_dict({"text": ["hello", "<|im_end|>", "", " \n", "a"], "label": [0, 1, 1, 0, 1]})
    assert [text_of(plain, example["input_ids"]) for example in encode(rows, plain, DATA, CAUSAL)] == [
        "hello<|im_end|>",
        "a<|im_end|>",
    ]
    assert (
        "mine.jsonl: 3 of 5 rows have nothing to predict and are left out: a text of fewer than two tokens, its end "
        "token included (row 2); a blank text (rows 3 and 4)" in log.text
    )
    assert [example["labels"] for example in encode(rows, plain, DATA, Classification())] == [0, 1, 1]
    assert usable_rows(rows, plain, DATA, Classification()) == [0, 1, 4]
    conversations = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ]
    assert len(encode(Dataset.from_dict({"messages": conversations}), plain, DATA, CAUSAL)) == 1


def test_one_token_is_nothing_to_predict_without_an_end_token(byte_level: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<|im_end|>")
    rows = Dataset.from_dict({"text": ["a", "ab", "\n\n", "a" * 300]})
    assert usable_rows(rows, tokenizer, DATA, CAUSAL) == [1, 3]
    assert usable_rows(pairs(("a", ""), ("a", "b")), tokenizer, DATA, CAUSAL) == [1]
    assert len(encode(pairs(("a", ""), ("a", "b")), tokenizer, DATA, CAUSAL)) == 1


def test_long_words_that_the_vocabulary_lacks_are_one_token() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    rows = Dataset.from_dict({"text": ["x" * 400, "x" * 400 + " a", "x a"]})
    assert usable_rows(rows, tokenizer, DATA, CAUSAL) == [1, 2]


@pytest.mark.slow
def test_smollm2() -> None:
    from transformers import AutoTokenizer

    from fedlora.models.base.folders import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    contents = ["hi", " hello\n", "how are you?", "\n\nfine"]
    (example,) = encode(chat(*contents), tokenizer, DATA, CAUSAL)
    assert text_of(tokenizer, learned(example)) == " hello\n<|im_end|>\n\nfine<|im_end|>"
    assert prompt_ids(example) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
