"""Rows with nothing to predict: left out and counted; a client that has no others is refused, and the rest go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

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
    assert f"the first holds {empty!r}" in entry["failures"]["2"]
