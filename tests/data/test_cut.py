"""What is longer than `data.max-length` loses whole turns from the front, and never an answer's question."""

from __future__ import annotations

from dataclasses import replace

from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedlora.config import DataConfig
from fedlora.data import Example, encode
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from tests.data.conftest import CHATML

DATA = DataConfig(source="mine.jsonl", max_length=4096)
PLAIN = CHATML.replace("{% if loop.first and m['role'] != 'system' %}", "{% if false %}")


def example(messages: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, length: int) -> Example:
    rows = Dataset.from_dict({"messages": [[{"role": role, "content": text} for role, text in messages]]})
    (found,) = encode(rows, tokenizer, replace(DATA, max_length=length), CausalLM())
    assert len(found["input_ids"]) <= length
    assert isinstance(found["labels"], list)
    return found


def shown(found: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(found["input_ids"]))


def long(messages: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> int:
    return len(example(messages, tokenizer, 4096)["input_ids"])


SYSTEM = ("system", "You are kind")
FIRST = [("user", "how are you today?"), ("assistant", "I am fine, thank you!")]
TOOL = [("user", "weather?"), ("assistant", "look"), ("tool", "rain"), ("assistant", "it rains")]
LAST = [("user", "hello there"), ("assistant", "how are you?")]


def test_earlier_exchanges_go_first_and_whole(chatml: PreTrainedTokenizerFast) -> None:
    chat = [SYSTEM, *FIRST, *TOOL, *LAST]
    for kept in ([SYSTEM, *TOOL, *LAST], [SYSTEM, *LAST]):
        room = long(kept, chatml)
        for length in (room, room + 3):
            found = example(chat, chatml, length)
            assert (found["input_ids"], found.cut, found.whole) == (
                example(kept, chatml, 4096)["input_ids"],
                "turns",
                long(chat, chatml),
            )
    assert example(chat, chatml, long(chat, chatml)).cut == ""


def test_the_default_system_prompt_of_a_template_stays(chatml: PreTrainedTokenizerFast) -> None:
    found = example([*FIRST, *LAST], chatml, long(LAST, chatml))
    assert shown(found, chatml).startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhello there")


def test_a_system_prompt_goes_before_the_question_does(byte_level: object) -> None:
    from tests.data.conftest import wrap

    tokenizer = wrap(byte_level, PLAIN)  # pyright: ignore[reportArgumentType]
    found = example([SYSTEM, *FIRST, *LAST], tokenizer, long(LAST, tokenizer))
    assert (found.cut, found["input_ids"]) == ("system", example(LAST, tokenizer, 4096)["input_ids"])


def test_a_long_question_loses_its_start_under_the_system_prompt(chatml: PreTrainedTokenizerFast) -> None:
    chat = [SYSTEM, *FIRST, ("user", "hello there, " * 90 + "today?"), ("assistant", "fine")]
    found = example(chat, chatml, 64)
    text = shown(found, chatml)
    assert found.cut == "inside"
    assert text.startswith("<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("today?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>")
    assert "how are you today" not in text


def test_a_long_answer_loses_its_end(chatml: PreTrainedTokenizerFast) -> None:
    found = example([SYSTEM, *FIRST, ("user", "hello"), ("assistant", "thank you " * 90)], chatml, 64)
    text = shown(found, chatml)
    assert text.startswith(
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthank"
    )
    assert (found.cut, len(found["input_ids"])) == ("inside", 64)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.integers(1, 12), min_size=2, max_size=12),
    length=st.integers(8, 120),
    system=st.booleans(),
)
def test_no_answer_is_learned_without_its_question(
    chatml: PreTrainedTokenizerFast, turns: list[int], length: int, system: bool
) -> None:
    roles = ["user", "assistant"]
    contents = [f"{'hello ' * count}{place}." for place, count in enumerate(turns)]
    chat = [SYSTEM] * system + [(roles[place % 2], text) for place, text in enumerate(contents)]
    found = example(chat, chatml, length)
    text = shown(found, chatml)
    whole = [place for place, content in enumerate(contents) if content in text]
    if found.cut in ("", "turns", "system"):
        answers = len(turns) - len(turns) % 2
        assert whole == [*range(whole[0], answers)]
        assert whole[0] % 2 == 0
        assert (SYSTEM[1] in text) == (system and found.cut != "system")
    else:
        assert len(found["input_ids"]) == length
        assert all(f" {place}." not in text for place in range(len(turns) - len(turns) % 2 - 2))


def test_texts_lose_their_end_and_say_so(plain: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": ["hello there", "hello" * 50], "label": [0, 1]})
    for task in (CausalLM(), Classification()):
        short, cut = encode(rows, plain, replace(DATA, max_length=16), task)
        assert (short.cut, cut.cut) == ("", "end")
        assert short.whole == len(short["input_ids"])
        assert cut.whole > len(cut["input_ids"]) == 16
