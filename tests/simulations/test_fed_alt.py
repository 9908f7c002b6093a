"""Federations of FedALT's clients: what each of them gets, keeps and evaluates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapters import AdapterState
from fedlora.clients.answering.rows import train_and_test
from fedlora.clients.node import own_state
from fedlora.config import parse
from fedlora.exchange import ClientInfo
from fedlora.models import adapted
from fedlora.results.run_folder import folder_of
from fedlora.simulations import personal
from fedlora.simulations.comparison import cell as cells
from fedlora.simulations.engines import flower
from fedlora.strategies.base import ServerState
from fedlora.strategies.configured import configured
from fedlora.strategies.server import saved_state
from fedlora.tasks.predict import evaluate
from tests.device import bound
from tests.federation import run_locally, tiny, write_labels
from tests.naive.fedalt import mean_of_others
from tests.simulations.comparison.test_cell import classes, grid_of


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def of_fedalt(folder, model, **keys: Any):
    common = {"lora__ranks": "", "lora__rank": 2, "strategy__name": "fedavg", "lora__kind": "fedalt"}
    more = {"evaluate__clients": True, "data__client_test_fraction": 0.3, "train__lr": 2e-2, "train__steps": 6}
    return tiny(folder, model, **{**common, **more, **keys})


def state_of(folder: Path) -> ServerState:
    key = json.loads((folder / "result.json").read_text(encoding="utf-8"))["key"]
    found = saved_state.load(folder / "state", key)
    assert found is not None
    return found[0]


def model_of(config: Any, folder: Path, client: int) -> AdapterState:
    """What the client would start its next round from."""
    key = json.loads((folder / "result.json").read_text(encoding="utf-8"))["key"]
    own = own_state.folder_of(folder / "clients", key, client)
    found = personal.model(configured(config), state_of(folder), ClientInfo(client_id=client, rank=2), own)
    assert found is not None
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_each_client_learns_and_evaluates_its_own_model(tmp_path, tiny_llama, quantization):
    config = of_fedalt(tmp_path, tiny_llama, model__quantization=quantization, federation__rounds=3)
    folder, result = run_locally(config)
    losses = [entry["client-test"]["mean"]["loss"] for entry in result["rounds"] if entry["round"]]
    assert losses[-1] < losses[0]
    down = [entry["download-bytes"] for entry in result["rounds"] if entry["round"]]
    up = [entry["upload-bytes"] for entry in result["rounds"] if entry["round"]]
    assert 2 * up[0] < down[0] < 3.5 * up[0]
    model = adapted.adapted_model(config.model, config.lora)
    own = {client: model_of(config, folder, client) for client in range(4)}
    rows = {client: result["rounds"][-1]["clients"][str(client)]["num-examples"] for client in range(4)}
    gates = []
    for client, mine in own.items():
        for name in mine.tensors:
            module, end = name.rsplit(".", 1)
            if end in ("fedalt_C", "fedalt_D"):
                part = f"{module}.fedalt_{'A' if end.endswith('C') else 'B'}"
                of_all = {each: other.tensors[part] for each, other in own.items()}
                torch.testing.assert_close(mine.tensors[name], mean_of_others(client, of_all, rows))
        gates.append(next(t for name, t in mine.tensors.items() if name.endswith("_G")))
        adapted.install(model, mine)
        test = train_and_test(config, client, "")[1]
        found = evaluate(model.task, model.model, test, config.evaluate.batch_size, model.base.pad_id)
        said = result["rounds"][-1]["client-test"]["clients"][str(client)]
        assert found["loss"] == pytest.approx(said["loss"], rel=1e-4)
    assert not torch.equal(gates[0], gates[1])
    assert all(gate.any() for gate in gates)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_clients_at_once_are_each_of_them_alone(tmp_path, tiny_llama, quantization, sizes):
    ends: list[dict[str, torch.Tensor]] = []
    for at_once in ("1", "auto"):
        keys = {"train__clients_at_once": at_once, "train__optimizer": "sgd", "train__lr": 0.5}
        config = of_fedalt(tmp_path, tiny_llama, run__id=f"r{at_once}", model__quantization=quantization, **keys)
        folder, _ = run_locally(config)
        ends.append(dict(model_of(config, folder, 1).tensors))
    assert sizes == [4, 4]
    for name, alone in ends[0].items():
        assert float((ends[1][name] - alone).norm() / alone.norm()) <= bound(1e-4)


def test_a_head_is_shared_and_a_client_that_is_out_keeps_its_place(tmp_path, tiny_bert):
    config = of_fedalt(
        tmp_path,
        tiny_bert,
        model__task="classification",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition_by="",
        data__partition="iid",
        lora__target_modules="query,value",
        federation__fraction=0.5,
        federation__rounds=4,
        wire__upload_dtype="int8",
    )
    folder, result = run_locally(config)
    took_part = {int(client) for entry in result["rounds"] for client in entry["clients"]}
    state = state_of(folder)
    kept = {int(key.rpartition("-")[2]) for key in state.memory if "client-" in key}
    assert kept == took_part
    assert len(took_part) > 2
    heads = [name for name in state.adapter.tensors if "classifier" in name]
    assert heads
    assert all(state.adapter.tensors[name].any() for name in heads)


def test_what_needs_one_matrix_is_refused_in_a_sentence(tmp_path, tiny_llama, command, fresh_process):
    folder, _ = run_locally(of_fedalt(tmp_path, tiny_llama))
    said = (
        "what lora.kind = fedalt adds to a layer is no fixed matrix, so that a client's own model has no LoRA factors"
    )
    for more in ((), ("--client", "1"), ("--all-clients",), ("--client", "1", "--merge")):
        code, _, refused = command("export", folder, tmp_path / "out", *more)
        assert code == 1, more
        assert said in " ".join(refused.split()), more
        assert not (tmp_path / "out").exists()
    code, _, refused = command("evaluate", "--adapter", folder)
    assert code == 1
    assert "fedalt_G stays on the clients" in refused
    assert command("report", folder)[0] == 0


def test_a_comparison_scores_each_clients_own_model(tmp_path, tiny_bert, monkeypatch):
    keys = {"lora.kind": "fedalt", "lora.ranks": "", "lora.rank": 2, "federation.rounds": 2}
    (cell,) = grid_of(tmp_path, classes(tmp_path, tiny_bert, **keys), ["fedavg"]).cells
    learned: list[AdapterState] = []
    seen = cells._scores
    monkeypatch.setattr(cells, "_scores", lambda config, states: learned.extend(states) or seen(config, states))
    found = cells.run(cell, tmp_path / "work")
    one, other = (state.tensors for state in learned)
    for name, value in one.items():
        if name.endswith(("_C", "_D")):  # of two clients, the others' mean is the other
            part = name[:-1] + {"C": "A", "D": "B"}[name[-1]]
            torch.testing.assert_close(value, other[part])
            torch.testing.assert_close(other[name], one[part])
            assert value.any()
    assert set(found["scores"]["test"]["clients"]) == {"0", "1"}


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_gives_it_too(tmp_path, tiny_llama):
    config = of_fedalt(tmp_path, tiny_llama)
    _, here = run_locally(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    there = json.loads((folder_of(other) / "result.json").read_text(encoding="utf-8"))
    losses = [[entry["client-test"]["mean"]["loss"] for entry in result["rounds"]] for result in (here, there)]
    assert losses[0] == pytest.approx(losses[1])
