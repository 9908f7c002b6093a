"""Rows with nothing to predict: left out and counted; a client that has no others is refused, and the rest go on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedlora.config import Config
from tests.federation import run_locally, tiny

NOTHING = "<|im_end|>"  # the end token, which is not added once more: one token, and nothing before it


@pytest.fixture(autouse=True)
def _fresh(fresh_process: None) -> None:
    """Bases and folds of one test are not the next one's."""


def people(path: Path, rows: dict[str, list[Any]]) -> str:
    lines = [{"text": text, "label": i % 2, "person": person} for person in rows for i, text in enumerate(rows[person])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def federation(folder: Path, model: Path, rows: dict[str, list[Any]], **keys: Any) -> Config:
    source = people(folder / "texts.jsonl", rows)
    few = {"federation__rounds": 1, "federation__clients": 3, "data__heldout_fraction": 0.2, "train__batch_size": 1}
    return tiny(folder, model, **{"data__source": source, "lora__ranks": "2", **few, **keys})


@pytest.mark.parametrize("at_once", ["1", "3"])
@pytest.mark.parametrize(("task", "empty"), [("causal-lm", NOTHING), ("causal-lm", ""), ("classification", "")])
def test_they_are_left_out_alone_and_in_a_cohort(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str], at_once: str, task: str, empty: str
) -> None:
    good = [f"ash {word}" for word in ("birch", "cedar", "elm", "fir", "hazel", "larch")]
    rows = {"p0": good, "p1": [empty, *good[:4], empty], "p2": [empty] * 6}
    config = federation(
        tmp_path, tiny_llama, rows, model__task=task, strategy__name="fedavg", train__clients_at_once=at_once
    )
    _, result = run_locally(config)
    assert math.isfinite(result["rounds"][0]["heldout"]["loss"])
    (entry,) = result["rounds"]
    assert set(entry["clients"]) == {"0", "1"}
    assert all(math.isfinite(answer["train-loss"]) for answer in entry["clients"].values())
    taught = {client: answer["num-examples"] for client, answer in entry["clients"].items()}
    held = {client["client-id"]: client["num-examples"] for client in result["clients"]}
    assert taught["0"] == held[0]
    assert taught["1"] < held[1]
    assert f"none of {held[2]} rows has anything to predict" in entry["failures"]["2"]
    assert "lines " in entry["failures"]["2"]


GOOD = {"messages": [{"role": "user", "content": "ash"}, {"role": "assistant", "content": "birch"}]}
REWRITTEN = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tool may begin') }}{% endif %}"


def chats(folder: Path, model: Path, bad: dict[str, Any], **keys: Any) -> Config:
    """Three hospitals, 36 rows, one of which (the first one's second) is this."""
    rows = [{**(bad if number == 3 else GOOD), "who": f"h{number % 3}"} for number in range(36)]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = {"federation__rounds": 1, "federation__clients": 3, "data__heldout_fraction": 0.0, "lora__ranks": "2"}
    here = {"data__source": str(path), "data__partition_by": "who", "evaluate__server": False, "train__steps": 12}
    return tiny(folder, model, **{**few, **here, "strategy__name": "fedavg", **keys})


@pytest.mark.parametrize("at_once", ["1", "3", "auto"])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}],
        [],
    ],
)
def test_a_row_without_an_answer_costs_nobody_a_round(
    tmp_path: Path, tiny_llama: Path, at_once: str, messages: list[Any]
) -> None:
    _, result = run_locally(chats(tmp_path, tiny_llama, {"messages": messages}, train__clients_at_once=at_once))
    (entry,) = result["rounds"]
    assert {client: answer["num-examples"] for client, answer in entry["clients"].items()} == {
        "0": 11,
        "1": 12,
        "2": 12,
    }


@pytest.mark.parametrize("at_once", ["1", "3", "auto"])
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "line 4: column 'messages' holds nothing (null), expected a list"),
        ([{"role": "user", "content": None}], "line 4: column 'messages' holds a message whose 'content' is nothing"),
        (
            [{"role": "tool", "content": "secret"}, {"role": "assistant", "content": "b"}],
            "line 4: the tokenizer's chat template refuses the roles tool, assistant: no tool may begin",
        ),
    ],
)
def test_a_row_that_cannot_be_read_fails_its_own_client_alone(
    tmp_path: Path, tiny_llama: Path, at_once: str, messages: Any, says: str
) -> None:
    model = tmp_path / "picky"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = REWRITTEN + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    _, result = run_locally(chats(tmp_path, model, {"messages": messages}, train__clients_at_once=at_once))
    (entry,) = result["rounds"]
    assert set(entry["clients"]) == {"1", "2"}
    assert says in entry["failures"]["0"]
    assert "secret" not in entry["failures"]["0"]


@pytest.mark.parametrize("at_once", ["1", "3"])
def test_a_class_that_is_none_fails_its_own_client_alone(tmp_path: Path, tiny_llama: Path, at_once: str) -> None:
    keys = {"model__task": "classification", "train__clients_at_once": at_once}
    config = chats(tmp_path, tiny_llama, {"text": "ash", "label": 7}, **keys)
    rows = [
        {"text": f"ash {number}", "label": 7 if number == 3 else number % 2, "who": f"h{number % 3}"}
        for number in range(36)
    ]
    Path(config.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, result = run_locally(config)
    (entry,) = result["rounds"]
    assert set(entry["clients"]) == {"1", "2"}
    assert "column 'label' holds classes outside 0 to 1 in line 4; correct these rows" in entry["failures"]["0"]
