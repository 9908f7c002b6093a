"""A whole federation trained several clients at once, against one after another."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedlora.clients.answering import together
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.clients.optimizers.standard import AdamW
from fedlora.clients.training import cohort
from fedlora.common.errors import ConfigError
from fedlora.common.once import say_once
from fedlora.config import Config, parse
from fedlora.exchange import Broadcast, wire
from fedlora.models import base_fingerprint
from fedlora.models.stacked import NotStackable, Stack
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.initializers import uniform
from fedlora.strategies.registry import NAMES
from tests.device import assert_same, run_bound
from tests.federation import tiny
from tests.simulations.engines.test_local import saved_adapter

EQUAL_RANKS = {"lora.ranks": "2"}
KEYS = {
    **dict.fromkeys(("fedavg", "fedrot", "frlora"), EQUAL_RANKS),
    "fedsa": {"evaluate.clients": True, "data.client-test-fraction": 0.3},
}

# From round 2 on, clients of ranks 4, 2, 2 and 1 have anchors of their own, or of their ranks.
OWN_ANCHORS = {"lora-a2", "fed-plora"}


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    say_once.cache_clear()


def config_of(folder, model, at_once: int, **keys) -> Config:
    return tiny(folder, model, run__id=f"at-once-{at_once}", train__clients_at_once=str(at_once), **keys)


def played(config: Config) -> tuple[dict[str, torch.Tensor], dict]:
    held_folds._held.clear()
    simulation.in_process(config)
    return saved_adapter(folder_of(config)), json.loads((folder_of(config) / "result.json").read_text())


def products(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Effective updates: a compressed checkpoint's factors are only determined up to a rotation."""
    kept = {name: value.double() for name, value in adapter.items() if ".lora_" not in name}
    for name, value in adapter.items():
        if name.endswith(".lora_A.weight"):
            kept[name] = adapter[name.replace("lora_A", "lora_B")].double() @ value.double()
    return kept


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    left, right = products(one), products(two)
    assert left.keys() == right.keys()
    gap = sum(float((left[n] - right[n]).norm()) ** 2 for n in left)
    return (gap / max(1e-30, sum(float(value.norm()) ** 2 for value in left.values()))) ** 0.5


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_strategy_learns_the_same(tmp_path, tiny_llama, name, caplog, sizes):
    keys = KEYS.get(name, {})
    plain = [config_of(tmp_path, tiny_llama, at_once, train__steps=5) for at_once in (1, 4)]
    configs = [parse({"strategy.name": name, **keys}, config) for config in plain]
    with caplog.at_level(logging.INFO, "fedlora"):
        (one, first), (two, second) = (played(config) for config in configs)
    assert sizes == ([4, 2] if name in OWN_ANCHORS else [4] * configs[1].federation.rounds)
    assert apart(one, two) < run_bound(1e-4)
    for left, right in zip(first["rounds"], second["rounds"], strict=True):
        assert left["clients"].keys() == right["clients"].keys()
        for client, metrics in left["clients"].items():
            assert right["clients"][client]["train-loss"] == pytest.approx(metrics["train-loss"], rel=1e-4)
            assert right["clients"][client]["train-tokens"] == metrics["train-tokens"]
        if name == "fedsa":
            assert right["client-test"]["mean"]["loss"] == pytest.approx(left["client-test"]["mean"]["loss"], rel=1e-4)
    said = [r.message for r in caplog.records if "one at a time" in r.message]
    assert len(said) == (1 if name == "fedsb" else 0)  # its gradients


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "lora-fair", "wire.upload-dtype": "int8", "lora.dropout": 0.2},
        {"anchor.base-update": "merge"},
        {"federation.fraction": 0.75, "train.steps": 0, "train.epochs": 0.5, "data.client-max": 8},
        {"strategy.name": "hetlora", "strategy.options": "prune-gamma=0.6, prune-weight=0.1"},
        {"strategy.name": "flexlora", "strategy.options": "keep-tail=true", "federation.rounds": 3},
    ],
    ids=lambda keys: next(iter(keys.values())),
)
def test_whatever_a_round_asks_for(tmp_path, tiny_llama, keys, sizes):
    one, two = (played(parse(keys, config_of(tmp_path, tiny_llama, n)))[0] for n in (1, 3))
    assert max(sizes) == 3
    assert apart(one, two) < run_bound(1e-4)


def test_clients_with_an_anchor_of_their_own_are_trained_beside_it(tmp_path, tiny_llama, sizes):
    """The tails of ranks 4, 2, 2 and 1: only those of equal ranks may share a batch."""
    keys = {"strategy.name": "flexlora", "strategy.options": "keep-tail=true", "train.lr": 5e-2}
    one, two = (played(parse(keys, config_of(tmp_path, tiny_llama, n)))[0] for n in (1, 4))
    assert sizes == [4, 2]
    assert apart(one, two) < run_bound(1e-4)


def test_the_same_run_gives_the_same_bits(tmp_path, tiny_llama, sizes):
    one, _ = played(config_of(tmp_path, tiny_llama, 3))
    (tmp_path / "again").mkdir()
    two, _ = played(config_of(tmp_path / "again", tiny_llama, 3))
    assert set(sizes) == {3}
    assert_same(two, one)


def test_memory_that_runs_out_halves_the_cohort_and_loses_nothing(tmp_path, tiny_llama, monkeypatch, caplog):
    whole = cohort.train
    sizes = []

    def scarce(bench, members, *words, **more):
        sizes.append(len(members))
        if len(members) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(bench, members, *words, **more)

    one, _ = played(config_of(tmp_path, tiny_llama, 1))
    monkeypatch.setattr(cohort, "train", scarce)
    two, result = played(config_of(tmp_path, tiny_llama, 4))
    assert sizes[:3] == [4, 2, 2]
    assert_same(two, one)
    assert all(entry["failures"] == {} for entry in result["rounds"])
    assert "memory ran out with 4 clients at once; continuing with 2" in caplog.text


@pytest.mark.parametrize("why", ["optimizer", "rows"])
def test_what_cannot_be_batched_is_trained_one_at_a_time_and_said_once(tmp_path, tiny_llama, monkeypatch, caplog, why):
    if why == "optimizer":
        monkeypatch.setattr(AdamW, "shares_batch", False)
        says = "train.optimizer = 'adamw' cannot step clients whose factors lie in one tensor"
    else:

        def odd(stack, x):
            raise NotStackable("a layer saw 3 rows of a batch of 8, which belong to no client")

        monkeypatch.setattr(Stack, "check", odd)
        says = "a layer saw 3 rows of a batch of 8, which belong to no client"
    with caplog.at_level(logging.INFO, "fedlora"):
        one, _ = played(config_of(tmp_path, tiny_llama, 1))
        two, _ = played(config_of(tmp_path, tiny_llama, 4))
    assert_same(two, one)
    assert caplog.text.count("one at a time") == caplog.text.count(says) == 1


def test_a_client_that_cannot_take_part_fails_alone(tmp_path, tiny_llama, sizes):
    config = config_of(tmp_path, tiny_llama, 4, lora__ranks="2")
    flat = config.to_flat()
    nodes = [{"partition-id": i, "num-partitions": 4, "state": str(tmp_path / "state")} for i in range(4)]
    nodes[2]["max-rank"] = 1
    grid = local.LocalGrid(client_app, nodes, flat, 5, together)
    fingerprint = base_fingerprint(config.model)
    hello = [Message(wire.encode_hello(fingerprint), node, "query", group_id="0") for node in grid.get_node_ids()]
    infos = [wire.decode_info(reply.content, fingerprint, "x") for reply in grid.send_and_receive(hello)]
    start = uniform.seeded(config, [replace(info, rank=2) for info in infos])
    sent = wire.encode_broadcast(Broadcast(round=1, adapter=start), fingerprint)
    asked = list(grid.push_messages([Message(sent, node, "train", group_id="1") for node in grid.get_node_ids()]))
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(asked)}
    assert sizes == [3]
    assert [replies[known].has_error() for known in asked] == [False, False, True, False]
    assert re.search(
        r"client 2 affords [\d,]+; .* has rank 2, expected 1 \(node config: max-rank\)", replies[asked[2]].error.reason
    )


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_wrong_number_is_refused(tmp_path, tiny_llama, value):
    with pytest.raises(ConfigError, match=r"train.clients-at-once: got .*, expected auto or a number"):
        tiny(tmp_path, tiny_llama, train__clients_at_once=value)


def test_auto_takes_what_keeps_the_machine_busy_and_memory_affords(tmp_path, tiny_llama, monkeypatch):
    def number(**keys) -> int:
        config = tiny(tmp_path, tiny_llama, **{"train__clients_at_once": "auto", **keys})
        context = Context(
            1, 2, {"partition-id": 0, "num-partitions": 4, "allow-files": True}, RecordDict(), config.to_flat()
        )
        return together.how_many(context)

    assert number(train__clients_at_once="7") == 7
    short, long = number(train__batch_size=1), number(train__batch_size=4)
    assert short > long >= 1
    assert short == pytest.approx(4 * long, abs=4)
    assert number(train__batch_size=4096) == 1
    monkeypatch.setattr(together, "bytes_per_token", lambda bench: 2**50)
    assert number(train__batch_size=1) == 1


@pytest.mark.parametrize(
    "keys", [{"lora.rslora": True, "lora.ranks": "8,8,3,2"}, {"lora.alpha": 16, "lora.ranks": "12"}]
)
@pytest.mark.parametrize("upload", ["fp32", "int8"])
def test_a_scaling_that_fp32_does_not_hold_loses_no_client(tmp_path, tiny_llama, keys, upload):
    """8 alpha's root and 16/12 are no fp32 numbers; the cohort's replies carry them as they were sent."""
    keys = {"lora.alpha": "2r", **keys, "wire.upload-dtype": upload}
    _, result = played(config_of(tmp_path, tiny_llama, 4, **keys))
    assert [entry["failures"] for entry in result["rounds"]] == [{}, {}]
    assert [len(entry["clients"]) for entry in result["rounds"]] == [4, 4]
