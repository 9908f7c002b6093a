"""RoLoRA: whose turn it is, and rows that nobody trained."""

from __future__ import annotations

import torch

from fedlora.adapters import LoraFactors
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from tests.naive.clients import start, train


def test_b_and_a_take_turns_and_b_comes_first() -> None:
    strategy, client = load("rolora"), ClientInfo(client_id=0, rank=2)
    state = strategy.init(start([client]))
    for round, factor in enumerate("BABAB", start=1):
        sent = strategy.broadcast(state, client, round)
        assert sent.plan.train == sent.plan.send == {factor}
        before = state
        state = strategy.aggregate(state, [train(sent, client, round)], round)
        for name, factors in state.adapter.lora.items():
            other = "A" if factor == "B" else "B"
            assert torch.equal(getattr(factors, other), getattr(before.adapter.lora[name], other))
            assert not torch.equal(getattr(factors, factor), getattr(before.adapter.lora[name], factor))


def test_rows_that_only_an_absent_client_has_are_kept_alive_and_add_nothing() -> None:
    strategy = load("rolora")
    large, small = ClientInfo(client_id=0, rank=3, alpha="r"), ClientInfo(client_id=1, rank=1, alpha="r")
    state = strategy.init(start([large, small]))
    seeded: LoraFactors = state.adapter.lora["layers.0.q"]
    for round in (1, 2, 3, 4):
        state = strategy.aggregate(state, [train(strategy.broadcast(state, small, round), small, round)], round)
        now = state.adapter.lora["layers.0.q"]
        torch.testing.assert_close(now.A[1:], seeded.A[1:])
        assert not now.B[:, 1:].any()


def test_a_row_learned_before_counts_as_zero_when_only_smaller_clients_train_it() -> None:
    """The mean of the clients' updates has nothing in that row. B stays, so that A can return."""
    strategy = load("rolora")
    large, small = ClientInfo(client_id=0, rank=3, alpha="r"), ClientInfo(client_id=1, rank=1, alpha="r")
    state = strategy.init(start([large, small]))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, large, 1), large, 1)], 1)
    learned = state.adapter.lora["layers.0.q"]
    state = strategy.aggregate(state, [train(strategy.broadcast(state, small, 2), small, 2)], 2)
    assert not state.adapter.lora["layers.0.q"].A[1:].any()
    state = strategy.aggregate(state, [train(strategy.broadcast(state, small, 3), small, 3)], 3)
    assert torch.equal(state.adapter.lora["layers.0.q"].B[:, 1:], learned.B[:, 1:])
