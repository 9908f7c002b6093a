"""A thousand clients in one process: those that are not at work cost next to nothing."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch._subclasses import FakeTensor

from fedlora import config as configuration
from fedlora import data
from fedlora.adapters import AdapterState
from fedlora.clients.answering import rows as rows_
from fedlora.clients.node import own_state
from fedlora.common.events import listen
from fedlora.config import Config, Scalar, load
from fedlora.data import Split, lazy
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.federation import run_locally, tiny, write_rows

PRESET = Path(__file__).resolve().parents[2] / "configs" / "thousand.toml"
SAMPLED = 4


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    yield
    rows_.train_and_test.cache_clear()


def many(folder: Path, model: Path, clients: int, **keys: Scalar) -> Config:
    """Three rows each, four clients a round, one step of one row."""
    folder.mkdir(exist_ok=True)
    about: dict[str, Scalar] = {
        "data__source": str(write_rows(folder / "many.jsonl", people=clients, rows=3)),
        "data__heldout_max": 8,
        "federation__clients": clients,
        "federation__fraction": SAMPLED / clients,
        "federation__rounds": 3,
        "strategy__name": "lora-fair",
        "train__steps": 1,
        "train__batch_size": 1,
        "train__clients_at_once": str(SAMPLED),
    }
    return tiny(folder, model, **(about | keys))


def sampled(result: dict[str, Any]) -> list[set[int]]:
    """The clients of each round."""
    return [{int(client) for client in entry["clients"]} for entry in result["rounds"]]


def test_a_client_that_is_not_sampled_is_counted_and_never_read(tmp_path, tiny_llama, monkeypatch):
    counts: Counter[str] = Counter()
    opened: set[int] = set()
    client, encode, parse, load_rows = Split.client, lazy.encode_usable, configuration.parse, data.load_rows

    def opening(split: Split, client_id: int) -> Dataset:
        opened.add(client_id)
        return client(split, client_id)

    def encoding(rows, *words) -> list:
        counts["encoded"] += len(rows)
        return encode(rows, *words)

    def parsing(*words, **more) -> Config:
        counts["parsed"] += 1
        return parse(*words, **more)

    def reading(*words):
        counts["read"] += 1
        return load_rows(*words)

    config = many(tmp_path, tiny_llama, 1000)
    monkeypatch.setattr(Split, "client", opening)
    monkeypatch.setattr(lazy, "encode_usable", encoding)
    monkeypatch.setattr(configuration, "parse", parsing)
    monkeypatch.setattr(data, "load_rows", reading)
    _, result = run_locally(config)

    rounds = sampled(result)
    at_work = set().union(*rounds)
    assert [len(chosen) for chosen in rounds] == [SAMPLED] * 3
    assert len(at_work) > 2 * SAMPLED  # other clients in other rounds
    assert len(result["clients"]) == 1000
    assert {about["rank"] for about in result["clients"]} == {4, 2, 1}
    assert opened == at_work
    assert counts["encoded"] <= SAMPLED * 3  # the rows of their steps
    assert counts["read"] == 1
    assert counts["parsed"] <= 3  # by the server, and by the first client


def test_examples_are_counted_as_they_are_dealt(tmp_path, tiny_llama):
    config = many(tmp_path, tiny_llama, 60, evaluate__clients=True, federation__fraction=0.2, federation__rounds=1)
    _, result = run_locally(config)
    told = {str(about["client-id"]): about["num-examples"] for about in result["clients"]}
    trained = {client: metrics["num-examples"] for client, metrics in result["rounds"][0]["clients"].items()}
    assert trained == {client: told[client] for client in trained}
    split = data.prepare(config)
    assert sum(told.values()) == sum(len(part) - (len(part) > 1) for part in split.parts)  # a test row of each


def footprint() -> tuple[int, int]:
    """Data sets that are alive, and bytes of all tensors. What torch.compile left of other tests has no bytes."""
    gc.collect()
    kinds = Counter(type(one) for one in gc.get_objects())
    of_kind = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    tensors = [one for one in of_kind if not issubclass(type(one), FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(count for kind, count in kinds.items() if kind is Dataset), sum(storages.values())


def test_what_is_held_does_not_depend_on_the_number_of_clients(tmp_path, tiny_llama):
    held: dict[int, list[tuple[int, int]]] = {}
    for clients in (12, 600):
        rows_.train_and_test.cache_clear()
        data._prepare.cache_clear()
        seen = held.setdefault(clients, [])
        config = many(tmp_path / str(clients), tiny_llama, clients, lora__ranks="2", federation__rounds=1)
        with listen(lambda kind, facts, seen=seen: seen.append(footprint()) if kind == "round-end" else None):
            run_locally(config)
    assert held[12] == held[600]


KEEPING = {
    "personal": {"strategy__name": "fedsa", "evaluate__clients": True, "data__client_test_fraction": 0.3},
    "left-out": {"wire__upload_dtype": "int8"},
}


@pytest.mark.parametrize("kind", KEEPING)
def test_what_clients_keep_lies_on_disk_alone_and_only_of_those_that_were_at_work(
    tmp_path, tiny_llama, monkeypatch, kind
):
    states: list[weakref.ref[AdapterState]] = []
    held: list[int] = []
    loaded: list[int] = []
    save, read = own_state.save, own_state.load

    def saving(folder: Path, kind: str, state: AdapterState, number: int, keep: int) -> None:
        states.append(weakref.ref(state))
        save(folder, kind, state, number, keep)

    def loading(folder: Path, kind: str, number: int) -> AdapterState | None:
        state = read(folder, kind, number)
        if state is not None:
            states.append(weakref.ref(state))
            loaded.append(number)
        return state

    def at_end(event: str, facts: dict[str, Any]) -> None:
        if event == "round-end":
            held.append(footprint()[1])
            assert [state for state in states if state() is not None] == []

    monkeypatch.setattr(own_state, "save", saving)
    monkeypatch.setattr(own_state, "load", loading)
    config = many(tmp_path, tiny_llama, 12, lora__ranks="2", federation__rounds=5, run__keep=1, **KEEPING[kind])
    with listen(at_end):
        folder, result = run_locally(config)

    assert loaded  # some clients came back
    assert len(set(held[1:])) == 1
    at_work = set().union(*sampled(result))
    assert len(at_work) < 12
    own = {path.name: path for path in (folder / "clients").glob("*/client-*")}
    assert own.keys() == {f"client-{client}" for client in at_work}
    for path in own.values():
        files = [file.name for file in path.iterdir()]
        assert 1 <= len(files) <= 2  # of its last round, and of the one before
        assert all(name.startswith(kind) for name in files)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_preset_with_fewer_rounds_and_clients_at_work(tmp_path):
    keys = ["federation.rounds=2", "federation.fraction=0.008", "data.heldout-max=16"]
    config = load(PRESET, [f"run.dir={tmp_path}", "run.id=one", *keys])
    simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text(encoding="utf-8"))
    one, two = sampled(result)
    assert len(one) == len(two) == 8
    assert not one & two
    assert len(result["clients"]) == 1000
    assert min(about["num-examples"] for about in result["clients"]) >= 1
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
