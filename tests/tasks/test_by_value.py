"""Metrics by value of a column: against loops over single predictions, in runs, in records and in what is printed."""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora.common.errors import DataError
from fedlora.config import Config
from fedlora.data import encode, prepare
from fedlora.models import load_base
from fedlora.results import journal
from fedlora.tasks.by_value import named, plain, scored
from fedlora.tasks.classification import Classification
from fedlora.tasks.registry import task_of
from tests.federation import WORDS, run_locally, tiny
from tests.tasks.test_scores import loop_calibration, loop_f1, predictions


def write_domains(path: Path, rows: int = 120) -> Path:
    """Texts of two classes and three domains of unequal sizes; in the domain "hard" nothing tells the classes apart."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            domain = ("easy", "easy", "easy", "plain", "plain", "hard")[index % 6]
            label = rng.randrange(2)
            word = rng.choice(WORDS) if domain == "hard" else ("bad", "good")[label]
            file.write(json.dumps({"text": f"{word} {rng.choice(WORDS)}", "label": label, "domain": domain}) + "\n")
    return path


def config_of(folder: Path, model: Path, **keys: Any) -> Config:
    own = {
        "model__task": "classification",
        "lora__target_modules": "query,value",
        "data__source": str(write_domains(folder / "domains.jsonl")),
        "data__partition_by": "domain",
        "data__heldout_fraction": 0.3,
        "data__heldout_max": 0,
        "federation__clients": 3,
        "strategy__name": "flora",
        "lora__ranks": "2",
        "train__lr": 0.02,
        "evaluate__by": "domain",
    }
    return tiny(folder, model, **(own | keys))


def test_each_value_has_the_metrics_of_its_own_rows():
    made = predictions(3, n=60, examples=9)
    groups = {"a": np.array([0, 4, 5]), "b": np.array([1]), "c": np.array([2, 3, 6, 7, 8])}
    by = scored(Classification(labels=3), made, "domain", groups).by
    assert by["column"] == "domain"
    for value, rows in groups.items():
        at = [i for i, row in enumerate(made.rows.tolist()) if row in rows.tolist()]
        predicted, targets = made.predicted[at].tolist(), made.targets[at].tolist()
        correct = [p == t for p, t in zip(predicted, targets, strict=True)]
        assert by["values"][value] == {
            "rows": len(rows),
            "loss": pytest.approx(sum(made.losses[at].tolist()) / len(at)),
            "accuracy": pytest.approx(sum(correct) / len(at)),
            "calibration-error": pytest.approx(loop_calibration(made.probabilities[at].tolist(), correct)),
            "macro-f1": pytest.approx(loop_f1(predicted, targets)),
        }
    accuracies = [by["values"][value]["accuracy"] for value in groups]
    losses = [by["values"][value]["loss"] for value in groups]
    assert by["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert by["worst"]["accuracy"] == min(accuracies)
    assert by["worst"]["loss"] == max(losses)
    assert named(by)["accuracy-mean-by"] == by["mean"]["accuracy"]
    assert named(by)["loss-worst-by"] == by["worst"]["loss"]
    assert {plain(name) for name in named(by)} == by["mean"].keys()


def test_without_a_column_nothing_is_added():
    found = scored(Classification(labels=3), predictions(0), "", {})
    assert found.by == {}
    assert named(found.by) == {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> tuple[Config, Path, dict[str, Any]]:
    config = config_of(tmp_path_factory.mktemp("by"), tiny_bert)
    return config, *run_locally(config)


def test_a_run_records_what_the_checkpoint_predicts_in_each_domain(finished):
    config, folder, result = finished
    base = load_base(config.model)
    model = PeftModel.from_pretrained(base.model, str(folder / "adapter")).eval()
    heldout = prepare(config).heldout
    right: dict[str, list[bool]] = defaultdict(list)
    task = task_of(config.model)
    for row, example in zip(heldout, encode(heldout, base.tokenizer, config.data, task), strict=True):
        ids = torch.tensor([example["input_ids"]], device=next(model.parameters()).device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        right[row["domain"]].append(int(logits.argmax()) == row["label"])
    last = result["rounds"][-1]
    values = last["heldout-by"]["values"]
    assert list(values) == ["easy", "hard", "plain"]
    for domain, found in right.items():
        assert values[domain]["rows"] == len(found)
        assert values[domain]["accuracy"] == pytest.approx(sum(found) / len(found))


def test_all_rows_together_are_the_values_weighted_by_their_rows(finished):
    _, _, result = finished
    rounds = [(result["baseline"], result["baseline-by"])]
    rounds += [(entry["heldout"], entry["heldout-by"]) for entry in result["rounds"]]
    assert len(rounds) == 3
    for whole, by in rounds:
        values = by["values"].values()
        rows = sum(metrics["rows"] for metrics in values)
        for name in ("accuracy", "loss"):
            mean = sum(metrics[name] * metrics["rows"] for metrics in values) / rows
            assert mean == pytest.approx(whole[name], rel=1e-6)


def test_events_and_curves_have_the_values(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, result = finished
    events = journal.read(folder / "events.jsonl")
    ended = [event for event in events if event["event"] == "round-end"]
    assert ended[-1]["heldout-by"] == result["rounds"][-1]["heldout-by"]
    assert next(event for event in events if event["event"] == "baseline")["by"] == result["baseline-by"]
    curves = EventAccumulator(str(folder / "tensorboard"))
    curves.Reload()
    found = [point.value for point in curves.Scalars("heldout-by/hard/accuracy")]
    recorded = [result["baseline-by"], *(entry["heldout-by"] for entry in result["rounds"])]
    assert found == pytest.approx([by["values"]["hard"]["accuracy"] for by in recorded])


def test_the_command_line_shows_the_values_of_a_run_and_of_a_checkpoint(finished, tmp_path, command):
    _, folder, result = finished
    values = result["rounds"][-1]["heldout-by"]["values"]
    code, said, why = command("evaluate", "--adapter", folder / "adapter", "--json", tmp_path / "scores.json")
    assert code == 0, why
    assert "with the adapter, by domain" in said
    found = json.loads((tmp_path / "scores.json").read_text())["by"]
    for value, metrics in found["with the adapter"]["values"].items():
        assert metrics["loss"] == pytest.approx(values[value]["loss"], rel=1e-4)
        assert f"{metrics['loss']:.4f}" in said
    code, said, why = command("evaluate", "--adapter", folder / "adapter", "-c", "evaluate.by=label")
    assert code == 0, why
    assert "with the adapter, by label" in said
    code, _, why = command("evaluate", "--adapter", folder / "adapter", "-c", "evaluate.by=style")
    assert code == 1
    assert "no column 'style', which evaluate.by names; the columns are 'text', 'label', 'domain'" in " ".join(
        why.split()
    )


def test_a_run_says_its_worst_and_best_value_and_ends_with_a_table(tmp_path, tiny_bert, command):
    config = config_of(tmp_path, tiny_bert, federation__rounds=1)
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {json.dumps(v)}" for key, v in config.to_flat().items()))
    code, said, why = command("run", tmp_path / "run.toml")
    assert code == 0, why
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    values = json.loads((folder / "result.json").read_text())["rounds"][-1]["heldout-by"]["values"]
    found = sorted((metrics["accuracy"], value) for value, metrics in values.items())
    (worst, first), (best, last) = found[0], found[-1]
    assert f"accuracy by domain: worst {worst:.4f} ({first}), best {best:.4f} ({last})" in said
    assert "held-out rows by domain, after round 1" in said


def test_a_column_that_is_not_there_is_told_before_the_run(tmp_path, tiny_bert, command):
    config = config_of(tmp_path, tiny_bert, evaluate__by="style")
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {json.dumps(v)}" for key, v in config.to_flat().items()))
    code, _, why = command("data", tmp_path / "run.toml")
    assert code == 1
    assert "no column 'style', which evaluate.by names" in " ".join(why.split())
    with pytest.raises(DataError, match=r"no column 'style', which evaluate\.by names"):
        run_locally(config)
    assert not (tmp_path / "runs").exists()


def test_a_value_without_held_out_rows_is_told(tmp_path, tiny_bert, caplog):
    keys = {"data__heldout_fraction": 0.05, "data__heldout_max": 1, "federation__rounds": 1}
    with caplog.at_level(logging.WARNING, logger="fedlora"):
        _, result = run_locally(config_of(tmp_path, tiny_bert, **keys))
    (kept,) = result["rounds"][-1]["heldout-by"]["values"]
    others = ", ".join(repr(value) for value in ("easy", "hard", "plain") if value != kept)
    assert f"evaluate.by = 'domain': no held-out row has the value {others}, so that it has no metrics" in caplog.text


def test_a_language_model_is_scored_by_value_too(tmp_path, tiny_llama):
    _, result = run_locally(tiny(tmp_path, tiny_llama, evaluate__by="person", federation__rounds=1))
    by = result["rounds"][-1]["heldout-by"]
    assert list(by["values"]) == ["p0", "p1", "p2", "p3"]
    assert by["worst"]["perplexity"] == max(metrics["perplexity"] for metrics in by["values"].values())
    assert (
        "heldout-by" not in run_locally(tiny(tmp_path, tiny_llama, run__id="two", federation__rounds=1))[1]["rounds"][0]
    )
