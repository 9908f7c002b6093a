"""What one cell of a comparison says: fair starts, and scores that an evaluation of one's own gives too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora.clients.answering import single
from fedlora.clients.node import held_folds
from fedlora.config import Config, Scalar, parse
from fedlora.data import encode, prepare
from fedlora.models import adapted, load_base
from fedlora.simulations.comparison import cell as cells
from fedlora.simulations.comparison.grid import Grid, load
from fedlora.strategies.checks.clients import simulated
from fedlora.strategies.initializers.uniform import seeded
from fedlora.tasks.classification import Classification
from fedlora.tasks.predict import evaluate
from fedlora.tasks.registry import task_of
from tests.device import assert_same_figures, bound
from tests.federation import tiny, write_labels

SPLIT: dict[str, Scalar] = {"data.heldout-fraction": 0.3, "data.test-fraction": 0.5, "data.heldout-max": 0}


@pytest.fixture(autouse=True)
def _fresh(fresh_process: None) -> None:
    """Nothing of a base model is left to the next test."""


def grid_of(folder: Path, config: Config, strategies: list[str], **head: Any) -> Grid:
    """A comparison of these strategies on top of this config; learning rate and seed are the config's."""
    own = ("run.", "train.lr", "data.parts")
    base = {key: value for key, value in config.to_flat().items() if not key.startswith(own)}
    (folder / "base.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in base.items()))
    facts = {
        "config": "base.toml",
        "metric": "accuracy",
        "learning-rates": [config.train.lr],
        "seeds": [0],
        "baselines": [],
        "strategies": strategies,
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in (facts | head).items()]
    (folder / "grid.toml").write_text("".join(lines))
    return load(folder / "grid.toml", Path)


def classes(folder: Path, model: Path, **keys: Scalar) -> Config:
    """Two clients, a domain each, on a tiny BERT."""
    rows = str(write_labels(folder / "labels.jsonl", 160))
    base = tiny(folder, model, model__task="classification", lora__target_modules="query,value", federation__rounds=1)
    flat: dict[str, Scalar] = {
        "data.source": rows,
        "data.partition-by": "domain",
        "federation.clients": 2,
        "lora.ranks": "4,2",
        "train.lr": 2e-2,
    }
    return parse({**flat, **SPLIT, **keys}, base)


def independent(config: Config, adapter: Path | None, rows: str) -> dict[str, float]:
    """The scores of a PEFT checkpoint on the base, as anyone would load it."""
    base = load_base(config.model)
    model = base.model if adapter is None else PeftModel.from_pretrained(base.model, str(adapter))
    examples = encode(getattr(prepare(config), rows), base.tokenizer, config.data, task_of(config.model))
    return evaluate(task_of(config.model), model, examples, 16, base.pad_id)


def assert_scores(found: Mapping[str, Any], expected: Mapping[str, float]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("strategy", ["flora", "lora-fair"])
def test_scores_are_those_of_the_peft_checkpoint(tmp_path: Path, tiny_llama: Path, strategy: str) -> None:
    config = parse(SPLIT, tiny(tmp_path, tiny_llama, federation__rounds=1))
    (cell,) = grid_of(tmp_path, config, [strategy]).cells
    found = cells.run(cell, tmp_path / "work")
    adapted.forget()
    adapter = tmp_path / "work" / "run" / "0" / "adapter"
    untouched = independent(cell.configs[0], None, "test")
    for ours, theirs in (("validation", "heldout"), ("test", "test")):
        expected = independent(cell.configs[0], adapter, theirs)
        assert_scores(found["scores"][ours], expected)
        assert found["scores"][ours]["examples"] == len(getattr(prepare(cell.configs[0]), theirs))
    assert found["scores"]["test"]["loss"] < untouched["loss"] - 0.01
    assert found["status"] == "completed"
    assert found["config"] == cell.keys() == found["runs"][0]["config"]
    assert [client["rank"] for client in found["partition"]["clients"]] == [4, 2, 2, 1]


def test_the_base_is_untouched(tmp_path: Path, tiny_llama: Path) -> None:
    config = parse(SPLIT, tiny(tmp_path, tiny_llama, federation__rounds=1))
    cell = grid_of(tmp_path, config, ["flora"], baselines=["base"]).cells[-1]
    found = cells.run(cell, tmp_path / "work")
    adapted.forget()
    assert found["runs"] == []
    for ours, theirs in (("validation", "heldout"), ("test", "test")):
        assert_scores(found["scores"][ours], independent(config, None, theirs))


def test_clients_average_to_the_whole_for_a_global_model(tmp_path: Path, tiny_bert: Path) -> None:
    (cell,) = grid_of(tmp_path, classes(tmp_path, tiny_bert), ["flora"]).cells
    found = cells.run(cell, tmp_path / "work")["scores"]
    for name, held in (("validation", "heldout"), ("test", "test")):
        clients = found[name]["clients"]
        domains = list(getattr(prepare(cell.configs[0]), held)["domain"])
        counts = [clients[str(client)]["examples"] for client in range(2)]
        assert counts == [domains.count(domain) for domain in prepare(cell.configs[0]).names]
        for metric in ("accuracy", "loss"):
            mean = sum(clients[str(client)][metric] * counts[client] for client in range(2)) / sum(counts)
            assert mean == pytest.approx(found[name][metric], rel=bound(1e-5))
        assert sum(counts) == found[name]["examples"]


def test_by_value_is_by_client_where_each_client_is_a_value(tmp_path: Path, tiny_bert: Path) -> None:
    config = classes(tmp_path, tiny_bert, **{"evaluate.by": "domain"})
    (cell,) = grid_of(tmp_path, config, ["flora"], metric="accuracy-worst-by").cells
    found = cells.run(cell, tmp_path / "work")["scores"]
    for name in ("validation", "test"):
        values = found[name]["by"]["values"]
        assert found[name]["by"]["column"] == "domain"
        for client, domain in enumerate(prepare(cell.configs[0]).names):
            own = dict(found[name]["clients"][str(client)])
            assert values[domain]["rows"] == own.pop("examples")
            assert_scores(values[domain], own)
        accuracies = [metrics["accuracy"] for metrics in values.values()]
        assert found[name]["accuracy-mean-by"] == pytest.approx(sum(accuracies) / 2)
        assert found[name]["accuracy-worst-by"] == min(accuracies)
        assert found[name]["loss-worst-by"] == max(metrics["loss"] for metrics in values.values())


def test_clients_with_models_of_their_own_are_scored_by_them(tmp_path: Path, tiny_bert: Path, monkeypatch) -> None:
    (cell,) = grid_of(tmp_path, classes(tmp_path, tiny_bert), ["fedsa"]).cells
    learned = []
    seen = cells._scores
    monkeypatch.setattr(cells, "_scores", lambda config, states: learned.extend(states) or seen(config, states))
    found = cells.run(cell, tmp_path / "work")
    assert len(learned) == 2
    name = next(iter(learned[0].lora))
    assert [state.lora[name].A.shape[0] for state in learned] == [4, 2]
    assert not torch.allclose(learned[0].lora[name].B[:, :2], learned[1].lora[name].B)
    bench = adapted.adapted_model(cell.configs[0].model, cell.configs[0].lora)
    split = prepare(cell.configs[0])
    losses = []
    for client, state in enumerate(learned):
        adapted.install(bench, state)
        examples = encode(split.test, bench.base.tokenizer, cell.configs[0].data, Classification())
        own = [example for example, owner in zip(examples, split.owners[1], strict=True) if owner == client]
        losses.append(evaluate(bench.task, bench.model, examples, 16, bench.base.pad_id)["loss"])
        expected = evaluate(bench.task, bench.model, own, 16, bench.base.pad_id)
        assert_scores(found["scores"]["test"]["clients"][str(client)], expected)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert found["scores"]["test"]["loss"] == pytest.approx(sum(losses) / 2, rel=bound(1e-5))


def test_local_is_a_run_for_each_client_and_centralised_sees_all(tmp_path: Path, tiny_bert: Path) -> None:
    config = classes(tmp_path, tiny_bert, **{"federation.lost-clients": "fail"})
    grid = grid_of(tmp_path, config, ["flora"], baselines=["local", "centralised"])
    local, centralised = (cells.run(cell, tmp_path / "work") for cell in grid.cells[1:])
    rows = [prepare(grid.cells[0].configs[0]).count(client) for client in range(2)]
    assert len(local["runs"]) == 2
    assert [run["config"] for run in local["runs"]] == [grid.cells[1].keys(run) for run in range(2)]
    assert [run["clients"][0]["rank"] for run in local["runs"]] == [4, 2]
    assert [entry["rows"] for entry in local["partition"]["clients"]] == rows
    assert [entry["rank"] for entry in local["partition"]["clients"]] == [4, 2]
    assert set(local["scores"]["test"]["clients"]) == {"0", "1"}
    (run,) = centralised["runs"]
    assert run["clients"][0]["rank"] == 4
    assert [entry["rows"] for entry in centralised["partition"]["clients"]] == [sum(rows)]
    assert run["rounds"][0]["clients"]["0"]["train-steps"] == 2 * config.train.steps
    assert centralised["scores"]["test"]["examples"] == local["scores"]["test"]["examples"]


def test_strategies_of_one_seed_have_one_start_one_sample_and_one_order(tmp_path: Path, tiny_llama: Path, monkeypatch):
    """Equal ranks, half of the clients in each round: round 1 is the same for both, and later rounds' clients."""
    config = parse(
        SPLIT,
        tiny(tmp_path, tiny_llama, lora__ranks="2", federation__fraction=0.5, federation__rounds=3, train__steps=2),
    )
    order: list[list[Any]] = []
    batches = single.LazyExamples.__getitem__

    def noted(self: Any, index: Any) -> Any:
        example = batches(self, index)
        order[-1].append(tuple(example["input_ids"]))
        return example

    monkeypatch.setattr(single.LazyExamples, "__getitem__", noted)
    starts, runs = [], []
    for cell in grid_of(tmp_path, config, ["fedavg", "flora"]).cells:
        order.append([])
        starts.append(seeded(cell.configs[0], simulated(cell.configs[0])))
        (run,) = cells.run(cell, tmp_path / "work")["runs"]
        runs.append(run)
        adapted.forget()
        held_folds._held.clear()
    for state in starts[1:]:
        assert state.lora.keys() == starts[0].lora.keys()
        assert all(torch.equal(factors.A, starts[0].lora[name].A) for name, factors in state.lora.items())
        assert not any(factors.B.any() for factors in state.lora.values())
    chosen = [[sorted(entry["clients"]) for entry in run["rounds"]] for run in runs]
    assert chosen[0] == chosen[1]
    assert all(len(clients) == 2 for clients in chosen[0])
    assert len({tuple(clients) for clients in chosen[0]}) > 1
    assert order[0] == order[1]
    first = [{c: answer["train-loss"] for c, answer in run["rounds"][0]["clients"].items()} for run in runs]
    assert_same_figures(first[0], first[1])
    later = [{c: answer["train-loss"] for c, answer in run["rounds"][-1]["clients"].items()} for run in runs]
    assert later[0] != later[1]
