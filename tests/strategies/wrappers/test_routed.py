"""Experts averaged by routed tokens, against plain loops over clients and experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedlora.adapters import AdapterState
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientUpdate
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.configured import configured
from fedlora.strategies.wrappers.routed import Routed

SHAPES = {"m.mixlora_A": (4, 2, 5), "m.mixlora_B": (4, 6, 2), "m.mixlora_R": (4, 5), "m.mixlora_N": (4, 1)}


def tensors(seed: int, shares: list[float]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return {**found, "head": torch.randn(3, generator=g), "m.mixlora_N": torch.tensor(shares)[:, None]}


def replies(*shares: list[float]) -> list[ClientUpdate]:
    made = enumerate(shares)
    return [ClientUpdate(k, AdapterState(tensors=tensors(k, each)), 10 * (k + 1)) for k, each in made]


@pytest.fixture
def strategy() -> Strategy:
    made = configured(parse({"strategy.name": "fedavg", "lora.kind": "mixlora", "lora.kind-options": "experts=4"}))
    assert isinstance(made, Routed)
    return made


@pytest.fixture
def state(strategy: Strategy) -> ServerState:
    return strategy.init(AdapterState(tensors=tensors(99, [0.25] * 4)))


def test_an_expert_is_averaged_by_rows_times_the_share_of_tokens(strategy: Strategy, state: ServerState) -> None:
    shares = [[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0]]
    sent = replies(*shares)
    new = strategy.aggregate(state, iter(sent), 1).adapter.tensors
    for name in ("m.mixlora_A", "m.mixlora_B"):
        for e in range(4):
            weights = [update.num_examples * shares[k][e] for k, update in enumerate(sent)]
            expected = state.adapter.tensors[name][e].double()
            if sum(weights):
                parts = zip(weights, sent, strict=True)
                expected = sum(w * u.adapter.tensors[name][e].double() for w, u in parts) / sum(weights)
            torch.testing.assert_close(new[name][e].double(), expected, rtol=1e-5, atol=1e-6)
    for name in ("m.mixlora_R", "m.mixlora_N", "head"):  # by rows, as ever
        expected = sum(u.num_examples / 60 * u.adapter.tensors[name].double() for u in sent)
        torch.testing.assert_close(new[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_equal_shares_give_the_strategys_own_mean(strategy: Strategy, state: ServerState) -> None:
    sent = replies(*[[0.25] * 4] * 3)
    assert isinstance(strategy, Routed)
    plain = strategy.inner.aggregate(state, iter(sent), 1).adapter.tensors
    for name, tensor in strategy.aggregate(state, iter(sent), 1).adapter.tensors.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shares", [None, [[0.5], [0.5]], [[0.5], [0.6], [-0.1], [0.0]]])
def test_a_reply_without_usable_shares_is_named(strategy: Strategy, state: ServerState, shares) -> None:
    first, second = replies([0.25] * 4, [0.25] * 4)
    odd = {name: value for name, value in second.adapter.tensors.items() if name != "m.mixlora_N"}
    odd |= {} if shares is None else {"m.mixlora_N": torch.tensor(shares)}
    bad = dataclasses.replace(second, adapter=AdapterState(tensors=odd))
    with pytest.raises(StrategyError, match=r"m\.mixlora_A: client 1 sent no usable shares .* expected \(4, 1\)"):
        strategy.aggregate(state, iter([first, bad]), 1)
