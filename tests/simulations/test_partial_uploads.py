"""Whole federations of the strategies that train or send a part of the adapter alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from peft import PeftModel

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds, own_state
from fedlora.common.errors import StrategyError
from fedlora.common.events import listen
from fedlora.config import Config
from fedlora.data import encode, prepare
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, wire
from fedlora.models import adapted, base_fingerprint, load_base
from fedlora.simulations.engines import local
from fedlora.strategies import load
from fedlora.strategies.initializers import uniform
from fedlora.strategies.schedules.session import Session
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.predict import evaluate
from tests.federation import run_locally, tiny, write_labels

SHAPES = [(32, 32), (16, 32), (32, 64)] * 2  # q, v and down of two layers, [d_out, d_in]


@pytest.fixture(autouse=True)
def _fresh_process():
    yield
    adapted.forget()
    held_folds._held.clear()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("strategy", ["ffa", "rolora", "fedsvd", "fedsb"])
def test_what_is_learned_lowers_the_loss_exactly_and_peft_loads_it(tmp_path, tiny_llama, strategy, quantization):
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name=strategy,
        model__quantization=quantization,
        lora__alpha="16",
        federation__rounds=3,
        train__steps=6,
        train__lr=2e-2,
        train__schedule="constant",
    )
    folder, result = run_locally(config)
    entries = [entry for entry in result["rounds"] if entry["round"]]
    assert [entry["failures"] for entry in result["rounds"]] == [{}] * len(result["rounds"])
    assert len(entries) == 3
    assert entries[-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.1
    assert max(entry["aggregation-error"] for entry in entries) < 1e-5
    base = load_base(config.model)
    model = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
    examples = encode(prepare(config).heldout, base.tokenizer, config.data, CausalLM())
    assert evaluate(CausalLM(), model, examples, 16, base.pad_id)["loss"] == pytest.approx(
        entries[-1]["heldout"]["loss"], rel=1e-4
    )


def sent_values(strategy: str, number: int) -> int:
    """The numbers that clients of ranks 4, 2, 2, 1 send in a round."""
    out, into = sum(d_out for d_out, _ in SHAPES), sum(d_in for _, d_in in SHAPES)
    factors = {"ffa": "B", "fedsvd": "B", "fedsa": "A", "rolora": "AB"[number % 2], "fedsb": "" if number else "AB"}
    factor_values = 9 * (("A" in factors[strategy]) * into + ("B" in factors[strategy]) * out)
    return factor_values + (6 * (16 + 4 + 4 + 1) if strategy == "fedsb" and number else 0)


@pytest.mark.parametrize("strategy", ["ffa", "rolora", "fedsvd", "fedsa", "fedsb"])
def test_only_what_a_round_trained_for_the_server_is_sent(tmp_path, tiny_llama, strategy):
    config = tiny(tmp_path, tiny_llama, strategy__name=strategy, evaluate__clients=True, data__client_test_fraction=0.3)
    _, result = run_locally(config)
    for entry in result["rounds"]:
        arrays = 4 * 6 * (2 if strategy == "fedsb" and not entry["round"] else 1)
        headers = entry["upload-bytes"] - 4 * sent_values(strategy, entry["round"])
        assert 50 * arrays < headers < 128 * arrays


def test_round_0_is_recorded_without_an_evaluation_and_counts_failures(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, strategy__name="fedsb", evaluate__clients=True, data__client_test_fraction=0.3)
    folder, result = run_locally(config)
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    first = result["rounds"][0]
    assert not {"heldout", "client-test"} & first.keys()
    assert first["aggregation-error"] is None
    assert all(answer["train-steps"] == 0 for answer in first["clients"].values())
    assert first["train-loss"] == pytest.approx(result["baseline"]["loss"], abs=1.0)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] <= 4


def test_the_start_is_the_svd_of_the_gradient_by_the_full_weights(tmp_path, tiny_llama):
    """One client: the first update is the best approximation of minus its gradient, at the size that was asked for."""
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="fedsb",
        lora__init_options="first_step=1e-3",
        lora__ranks="3",
        federation__clients=1,
        federation__rounds=1,
        train__lr=0.0,
    )
    states = []
    aggregate = Session._aggregate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_aggregate", lambda *args: states.append(aggregate(*args)) or states[-1])
        run_locally(config)
    learned = load("fedsb").global_adapter(states[0])
    after = load("fedsb").global_adapter(states[1])

    from fedlora.clients.answering.rows import train_and_test
    from fedlora.clients.training.schedule import hash_seed
    from fedlora.data import batch_at
    from fedlora.tasks.checked import mean_loss

    base = load_base(config.model)
    for name in learned.lora:
        base.model.get_submodule(name).weight.requires_grad_()
    examples = train_and_test(config, 0, "")[0]
    chosen = batch_at(len(examples), config.train.batch_size, 0, hash_seed(config.run.seed, 0))
    task = CausalLM()
    mean_loss(task, base.model, task.collate([examples[i] for i in chosen], base.pad_id)).backward()
    for name, factors in learned.lora.items():
        gradient = base.model.get_submodule(name).weight.grad
        assert isinstance(gradient, torch.Tensor)
        u, s, vh = torch.linalg.svd(gradient.cpu())
        best = -(u[:, :3] * s[:3]) @ vh[:3]
        first = delta(factors)
        torch.testing.assert_close(first / first.norm(), best / best.norm(), rtol=0, atol=1e-4)
        assert float(first.square().mean().sqrt()) == pytest.approx(1e-3, rel=1e-3)
        torch.testing.assert_close(delta(after.lora[name]), first)  # nothing was trained


def test_the_head_is_trained_beside_the_cores(tmp_path, tiny_bert):
    config = tiny(
        tmp_path,
        tiny_bert,
        model__task="classification",
        lora__ranks="8",
        lora__target_modules="query,value",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition_by="domain",
        federation__clients=2,
        federation__rounds=3,
        strategy__name="fedsb",
        train__steps=20,
        train__batch_size=8,
        train__lr=2e-2,
    )
    _, result = run_locally(config)
    assert result["rounds"][-1]["heldout"]["accuracy"] > 0.8
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.1


def fedsa(folder: Path, model: Path, **keys: Any) -> Config:
    return tiny(folder, model, strategy__name="fedsa", evaluate__clients=True, data__client_test_fraction=0.3, **keys)


def test_with_factors_on_the_clients_only_they_evaluate(tmp_path, tiny_llama, caplog):
    with caplog.at_level(logging.INFO, logger="fedlora"):
        folder, result = run_locally(fedsa(tmp_path, tiny_llama, federation__rounds=3, train__lr=2e-2, train__steps=6))
    assert "no evaluation on held-out rows: there is no model without a client's own B" in caplog.text
    assert "baseline" not in result
    losses = [entry["client-test"]["mean"]["loss"] for entry in result["rounds"]]
    assert losses[2] < losses[1] < losses[0]
    assert all("heldout" not in entry and entry["aggregation-error"] is None for entry in result["rounds"])
    kept = sorted(path.relative_to(folder / "clients").parts[1:] for path in folder.rglob("personal-*.safetensors"))
    assert kept == [(f"client-{i}", f"personal-{round}.safetensors") for i in range(4) for round in (1, 2, 3)]


def test_fedsa_is_refused_where_nobody_evaluates(tmp_path, tiny_llama):
    trained = []
    with (
        listen(lambda kind, facts: trained.append(kind)),
        pytest.raises(StrategyError, match=r"fedsa: B stays on the clients.*set evaluate.clients = true"),
    ):
        run_locally(tiny(tmp_path, tiny_llama, strategy__name="fedsa"))
    assert "client-start" not in trained


class Node:
    """One client, asked message by message; `restart` is a fresh process on the same machine."""

    def __init__(self, config: Config, partition: int, folder: Path) -> None:
        self._config, self._partition, self._folder = config, partition, folder
        self._fingerprint = base_fingerprint(config.model)
        self.restart()

    def restart(self) -> None:
        adapted.forget()
        held_folds._held.clear()
        node: dict[str, Any] = {"partition-id": self._partition, "state": str(self._folder)}
        self._grid = local.LocalGrid(client_app, [node], self._config.to_flat(), run_id=7)

    def ask(self, kind: str, broadcast: Broadcast) -> Message:
        content = wire.encode_broadcast(broadcast, self._fingerprint)
        message = Message(content, 2, kind, group_id="1")
        [answer] = self._grid.send_and_receive([message])
        return answer

    def content(self, kind: str, broadcast: Broadcast) -> RecordDict:
        answer = self.ask(kind, broadcast)
        assert not answer.has_error(), answer.error
        return answer.content

    def train(self, broadcast: Broadcast) -> ClientUpdate:
        content = self.content("train", broadcast)
        return wire.decode_update(content, self._partition, broadcast, self._fingerprint).update

    def loss(self, broadcast: Broadcast) -> float:
        content = self.content("evaluate", broadcast)
        return wire.decode_evaluation(content, self._fingerprint, "client", CausalLM.metrics)[1]["loss"]

    def own(self) -> AdapterState:
        kept = own_state.load(own_state.folder_of(self._folder, 7, self._partition), "personal", 99)
        assert kept is not None
        return kept


def reference_loss(config: Config, partition: int, adapter: AdapterState, own: AdapterState) -> float:
    """The client's test rows under base + s B_own A, added to the weights."""
    from fedlora.clients.answering.rows import train_and_test

    base = load_base(config.model)
    for name, f in adapter.lora.items():
        update = delta(LoraFactors(A=f.A, B=own.lora[name].B, scaling=f.scaling))
        weight = base.model.get_submodule(name).weight.data
        weight += update.to(weight)
    own_rows = train_and_test(config, partition, "")[1]
    return evaluate(CausalLM(), base.model, own_rows, 16, base.pad_id)["loss"]


def test_each_client_goes_on_from_its_own_b_also_in_a_fresh_process(tmp_path, tiny_llama):
    config = fedsa(tmp_path, tiny_llama, train__lr=2e-2, train__steps=6)
    strategy = load("fedsa")
    infos = [ClientInfo(client_id=i, rank=rank, num_examples=8) for i, rank in enumerate((4, 2))]
    nodes = [Node(config, i, tmp_path / "state") for i in range(2)]
    state = strategy.init(uniform.seeded(config, infos))
    for round in (1, 2):
        sent = [strategy.broadcast(state, info, round) for info in infos]
        before = [node.own() for node in nodes] if round > 1 else None
        replies = [node.train(broadcast) for node, broadcast in zip(nodes, sent, strict=True)]
        state = strategy.aggregate(state, replies, round)
        kept = [node.own() for node in nodes]
        losses = []
        for i, (node, info) in enumerate(zip(nodes, infos, strict=True)):
            node.restart()
            broadcast = strategy.broadcast(state, info, round + 1)
            assert not any(f.B.any() for f in broadcast.adapter.lora.values())
            losses.append(node.loss(broadcast))
            assert losses[i] == pytest.approx(reference_loss(config, i, broadcast.adapter, kept[i]), rel=1e-4)
            assert all(f.A.numel() == 0 and f.B.any() for f in kept[i].lora.values())
            if before:
                assert all(not torch.equal(f.B, before[i].lora[n].B) for n, f in kept[i].lora.items())
        assert not any(torch.equal(f.B, kept[1].lora[n].B) for n, f in kept[0].lora.items())

    still = Node(fedsa(tmp_path, tiny_llama, train__lr=0.0), 0, tmp_path / "state")
    broadcast = strategy.broadcast(state, infos[0], 3)
    reply = still.train(broadcast)
    for name, factors in reply.adapter.lora.items():  # trained from what it kept, and from the A that was sent
        assert torch.equal(still.own().lora[name].B, kept[0].lora[name].B)
        assert torch.equal(factors.A, broadcast.adapter.lora[name].A)
        assert factors.B.numel() == 0


def test_a_kept_factor_of_another_rank_is_refused_with_what_to_do(tmp_path, tiny_llama):
    config = fedsa(tmp_path, tiny_llama)
    strategy, info = load("fedsa"), ClientInfo(client_id=0, rank=4)
    node = Node(config, 0, tmp_path / "state")
    start = strategy.init(uniform.seeded(config, [info]))
    node.train(strategy.broadcast(start, info, 1))
    smaller = strategy.broadcast(start, ClientInfo(client_id=0, rank=2), 2)
    answer = node.ask("evaluate", smaller)
    assert answer.has_error()
    assert "personal B is (32, 4), but this run needs (32, 2)" in str(answer.error.reason)
    assert "client-0 to start it anew" in str(answer.error.reason)
