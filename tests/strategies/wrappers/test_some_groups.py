"""Clients of unequal ranks train some of RAVAN's heads: the mean of each head, against plain loops over clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import Place
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.checks.clients import simulated
from fedlora.strategies.checks.sums import check_summed_ranks
from fedlora.strategies.configured import check_ranks, configured
from fedlora.strategies.wrappers.some_groups import SomeGroups, chosen
from tests.naive.ravan import mean_of_heads

HEADS, MODULES = 4, ("layers.0.q", "layers.1.q")
KEYS = {"strategy.name": "fedavg", "lora.kind": "ravan", "lora.ranks": "8,8,4,2", "federation.clients": 4}
CLIENTS = [ClientInfo(client_id=k, rank=rank, num_examples=3 + 2 * k) for k, rank in enumerate((8, 8, 4, 2))]
SMALL = CLIENTS[2:]


@pytest.fixture
def strategy() -> Strategy:
    made = configured(parse(KEYS))
    assert isinstance(made, SomeGroups)
    made.check(CLIENTS)
    return made


def drawn(seed: int) -> dict[str, Tensor]:
    """All parts of a server of rank 8, drawn at random, and a head of the task."""
    g, kind = torch.Generator().manual_seed(seed), KINDS.load("ravan")
    shapes = {kind.key(m, part): s for m in MODULES for part, s in kind.shapes(Place(m, 40, 48, 8)).items()}
    return {name: torch.randn(shape, generator=g) for name, shape in {**shapes, "head.weight": (3,)}.items()}


@pytest.fixture
def state(strategy: Strategy) -> ServerState:
    return replace(strategy.init(AdapterState(tensors=drawn(99))), seed=1)


def heads_of(strategy: Strategy, state: ServerState, client: ClientInfo, number: int) -> set[int]:
    """The heads that a plan lets a client train."""
    frozen = strategy.broadcast(state, client, number).plan.frozen
    heads = {head for head in range(HEADS) if f"ravan_H{head}" not in frozen}
    assert frozen == {f"ravan_{part}{head}" for head in {*range(HEADS)} - heads for part in "Hs"}
    return heads


def replied(strategy: Strategy, state: ServerState, client: ClientInfo, number: int) -> ClientUpdate:
    sent = strategy.broadcast(state, client, number)
    assert sent.adapter.tensors == state.adapter.tensors  # all heads are in the forward pass
    back = sent.plan.sent_back(AdapterState(tensors=drawn(100 * number + client.client_id)))
    return ClientUpdate(client.client_id, back, client.num_examples, start=sent.adapter)


@pytest.mark.parametrize("name", ["fedavg", "rblora", "fedavg-zeropad"])
def test_each_head_is_averaged_over_the_clients_that_trained_it(name: str, state: ServerState) -> None:
    strategy = configured(parse(KEYS | {"strategy.name": name}))
    for number in (1, 2, 3):
        sent = [replied(strategy, state, client, number) for client in CLIENTS]
        trained = {client.client_id: heads_of(strategy, state, client, number) for client in CLIENTS}
        assert [len(trained[k]) for k in range(4)] == [4, 4, 2, 1]
        new = strategy.aggregate(state, iter(sent), number)
        for module in MODULES:
            for part in "Hs":
                key = f"{module}.ravan_{part}"
                before = [state.adapter.tensors[f"{key}{head}"] for head in range(HEADS)]
                ends = {k: [drawn(100 * number + k)[f"{key}{head}"] for head in range(HEADS)] for k in range(4)}
                rows = {client.client_id: client.num_examples for client in CLIENTS}
                for head, expected in enumerate(mean_of_heads(before, ends, trained, rows)):
                    got = new.adapter.tensors[f"{key}{head}"]
                    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        state = new


def test_a_head_that_nobody_trained_keeps_its_bits(strategy: Strategy, state: ServerState) -> None:
    new = strategy.aggregate(state, iter([replied(strategy, state, client, 1) for client in SMALL]), 1)
    trained = set[int]().union(*(heads_of(strategy, state, client, 1) for client in SMALL))
    assert 0 < len(trained) < HEADS
    for name, before in state.adapter.tensors.items():
        kept = name != "head.weight" and int(name[-1]) not in trained
        assert torch.equal(new.adapter.tensors[name], before) == kept


def test_at_equal_ranks_it_is_the_strategy_alone_to_the_bit(strategy: Strategy, state: ServerState) -> None:
    equal = [replace(client, rank=8, rank_pattern={"0.q": 8}) for client in CLIENTS]
    strategy.check(equal)
    assert isinstance(strategy, SomeGroups)
    for client in equal:
        assert strategy.broadcast(state, client, 1) == strategy.inner.broadcast(state, client, 1)
    sent = [replied(strategy, state, client, 1) for client in equal]
    plain = strategy.inner.aggregate(state, iter(sent), 1).adapter.tensors
    for name, tensor in strategy.aggregate(state, iter(sent), 1).adapter.tensors.items():
        assert torch.equal(tensor, plain[name])


def test_clients_take_turns_with_all_heads_and_do_not_all_have_the_same() -> None:
    for client in range(5):
        rounds = [chosen(7, number, client, (4, 1)) for number in range(1, 5)]
        assert sorted(head for heads in rounds for head in heads) == [0, 1, 2, 3]
        halves = [chosen(7, number, client, (4, 2)) for number in (1, 2, 3)]
        assert sorted(halves[0] + halves[1]) == [0, 1, 2, 3]
        assert halves[2] == halves[0]
        uneven = [head for number in range(1, 5) for head in chosen(7, number, client, (4, 3))]
        assert [uneven.count(head) for head in range(4)] == [3] * 4
    assert {tuple(chosen(7, 1, client, (4, 1))) for client in range(3, 200, 4)} == {(0,), (1,), (2,), (3,)}
    assert chosen(7, 1, 0, (4, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rank", [3, 16])
def test_a_client_that_comes_with_a_rank_that_does_not_fit_is_named(strategy, state, rank: int) -> None:
    with pytest.raises(StrategyError, match=f"client 9 has rank {rank}, .* use one of the ranks 2, 4, 6, 8 for it"):
        strategy.broadcast(state, ClientInfo(client_id=9, rank=rank), 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora.ranks": "8,3"}, "client 1 has rank 3, .*ravan trains its share of 4 groups, where rank 8 trains all"),
        ({"lora.ranks": "6,2"}, "client 1 has rank 2, .* use one of the ranks 3, 6 for it"),
        ({"lora.rank-pattern": "q=4"}, "ravan: clients of ranks 8, 4, 2 train the same groups in all modules"),
        ({"strategy.robust": "krum"}, "strategy.robust = krum compares whole updates, and with unequal ranks"),
        ({"strategy.robust": "median"}, "strategy.robust = median compares factors entry by entry"),
        ({"lora.kind": "miss", "strategy.name": "rblora"}, "lora.kind = miss needs one rank"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(keys, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        check_ranks(parse(KEYS | {"federation.clients": 7} | keys))


def test_a_secure_sum_needs_one_rank() -> None:
    config = parse(KEYS | {"privacy.secure-sum": True})
    with pytest.raises(StrategyError, match="ravan with ranks 8, 4, 2 train different parts, and a sum does not say"):
        check_summed_ranks(configured(config), simulated(config), config)
    config = parse(KEYS | {"privacy.secure-sum": True, "lora.ranks": "8"})
    check_summed_ranks(configured(config), simulated(config), config)


def test_a_robust_bound_measures_what_was_sent(state: ServerState) -> None:
    """Clients that train fewer heads are no outliers; one that moved far is drawn back, in its own heads alone."""
    strategy = configured(parse(KEYS | {"strategy.robust": "norm-bound"}))
    sent = [replied(strategy, state, client, 1) for client in CLIENTS]
    far = {name: 1000 * tensor for name, tensor in sent[3].adapter.tensors.items()}
    new = strategy.aggregate(state, iter([*sent[:3], replace(sent[3], adapter=AdapterState(tensors=far))]), 1)
    assert max(float(tensor.norm()) for tensor in new.adapter.tensors.values()) < 30
