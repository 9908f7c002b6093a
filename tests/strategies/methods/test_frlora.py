"""FRLoRA: the start from the weights, the folds of the rounds, and runs on a quantized base."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters import delta
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState
from fedlora.strategies.configured import check_ranks, configured
from fedlora.strategies.methods.frlora import FrLora
from fedlora.strategies.wrappers.robust import Robust
from tests.naive.clients import SHAPES, HeldBase, Run, dense_deltas, start, started, train, weight
from tests.naive.dense import Part
from tests.naive.frlora import Module

RANK = 3
CLIENTS = [ClientInfo(client_id=i, rank=RANK, alpha=5.0, num_examples=i + 1) for i in range(3)]
BASE = {name: weight(name) for name in SHAPES}


def begun(strategy: Run | FrLora) -> ServerState:
    return started(strategy, strategy.init(start(CLIENTS)), CLIENTS)


def test_a_run_starts_at_the_base_model_with_the_best_part_of_each_weight_in_the_adapter() -> None:
    state = begun(FrLora())
    for name, update in dense_deltas(FrLora().global_adapter(state)).items():
        assert float(update.norm()) < 1e-5 * float(BASE[name].norm())
    for name, part in dense_deltas(state.adapter).items():
        u, s, vh = torch.linalg.svd(BASE[name].double(), full_matrices=False)
        torch.testing.assert_close(part, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-5, atol=1e-5)


def test_rounds_are_those_of_dense_weights() -> None:
    """What clients compute with, and the result, over rounds in which somebody is absent."""
    for strategy in (Run(FrLora()), Run(FrLora(), compact=False)):
        state, held = begun(strategy), [HeldBase() for _ in CLIENTS]
        twin = {name: Module(BASE[name], RANK, CLIENTS[0].scaling_of(name)) for name in SHAPES}
        for number, present in enumerate(((0, 1, 2), (0, 2), (1,), (0, 1, 2)), start=1):
            updates = []
            for j in present:
                client = ClientInfo(j, RANK, 5.0, num_examples=j + 1, known_base_version=held[j].version)
                sent = strategy.broadcast(state, client, number)
                held[j].apply(sent)
                for name, frozen in held[j].weights(BASE).items():
                    model = frozen + delta(sent.adapter.lora[name])
                    expected = (BASE[name].double() + twin[name].total()).float()
                    torch.testing.assert_close(model, expected, rtol=1e-4, atol=1e-4)
                updates.append(train(sent, client, number))
            state = strategy.aggregate(state, updates, number)
            learned = dense_deltas(strategy.global_adapter(state))
            for name, module in twin.items():
                sent_back = [(update.adapter.lora[name], update.num_examples) for update in updates]
                module.aggregate([Part(f.A, f.B, f.scaling, n) for f, n in sent_back])
                torch.testing.assert_close(learned[name], module.total(), rtol=1e-4, atol=1e-4)


def test_rounds_without_training_leave_every_weight_as_it_is() -> None:
    state = begun(FrLora())
    for number in (1, 2, 3):
        sent = [(FrLora().broadcast(state, client, number), client) for client in CLIENTS]
        echoes = [ClientUpdate(c.client_id, s.adapter, c.num_examples) for s, c in sent]
        state = FrLora().aggregate(state, echoes, number)
        for name, update in dense_deltas(FrLora().global_adapter(state)).items():
            assert float(update.norm()) < 1e-5 * float(BASE[name].norm())


def test_each_round_adds_a_fold_of_at_most_twice_the_rank_and_starts_again() -> None:
    strategy = Run(FrLora(), compact=False)
    first = state = begun(strategy)
    for number in (1, 2):
        sent = [strategy.broadcast(state, client, number) for client in CLIENTS]
        assert {(s.plan.begun, s.plan.span) for s in sent} == {(number, 1)}
        state = strategy.aggregate(state, [train(s, c, number) for s, c in zip(sent, CLIENTS, strict=True)], number)
        assert state.folds.version == 1 + number
        assert all(f.rank <= 2 * RANK for f in state.folds.parts[-1].lora.values())
        for name, factors in state.adapter.lora.items():
            assert torch.equal(factors.A, first.adapter.lora[name].A)
            assert torch.equal(factors.B, first.adapter.lora[name].B)


def test_what_does_not_fit_is_refused_by_name() -> None:
    plain = parse({"strategy.name": "frlora", "lora.ranks": ""})
    check_ranks(plain)
    with pytest.raises(StrategyError, match=r"frlora averages factors and needs one rank, got ranks 4, 2"):
        check_ranks(parse({"lora.ranks": "4,2"}, plain))
    with pytest.raises(StrategyError, match=r"lora\.init = eva: this strategy needs factors that start as pissa makes"):
        check_ranks(parse({"lora.init": "eva"}, plain))
    with pytest.raises(StrategyError, match=r"FrLora needs what lora\.init = pissa makes; set strategy\.restart-every"):
        configured(parse({"strategy.restart-every": 2}, plain))
    with pytest.raises(StrategyError, match=r"or use strategy\.name = "):
        configured(parse({"strategy.server-optimizer": "momentum"}, plain))
    Robust(FrLora(), rule="median").check(CLIENTS)  # all clients start from the same factors
