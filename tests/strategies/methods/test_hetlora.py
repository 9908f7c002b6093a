"""HetLoRA against dense norms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, norm
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState
from fedlora.strategies.methods.hetlora import HetLora
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, start, train
from tests.naive.drawn import before, factors_of, replies, updates_of
from tests.naive.hetlora import Module, weights

HETLORA = HetLora()


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_equals_the_dense_reference(parts: list[naive.Part], more: int) -> None:
    begun = before(parts, more)
    twin = Module(begun.lora["m"].A, begun.lora["m"].B, begun.lora["m"].scaling)
    twin.aggregate(parts)
    got = HETLORA.aggregate(HETLORA.init(begun), updates_of(parts), 1).adapter.lora["m"]
    torch.testing.assert_close(got.scaling * got.A, twin.A)
    torch.testing.assert_close(got.B, twin.B)


@settings(max_examples=30, deadline=None)
@given(parts=replies(least=2))
def test_weights_are_the_dense_norms(parts: list[naive.Part]) -> None:
    """Read off A: each client has one row of its own, one; so row k of the mean is w_k."""
    norms = [norm(factors_of(part)) for part in parts]
    for got, expected in zip(norms, weights(parts), strict=True):
        torch.testing.assert_close(got / sum(norms), expected)
    count, d_in = len(parts), parts[0].A.shape[1]
    marked = []
    for k, part in enumerate(parts):
        A, B = torch.zeros(count, d_in).double(), torch.zeros(1, count).double()
        A[k], B[0, k] = 1.0, norms[k] / (d_in**0.5)
        marked.append(naive.Part(A, B, 1.0, part.examples))
    got = HETLORA.aggregate(HETLORA.init(before(marked)), updates_of(marked), 1).adapter.lora["m"]
    torch.testing.assert_close(got.scaling * got.A[:, 0], torch.tensor(weights(parts)).double())


def test_fault_2_norms_are_those_of_the_effective_updates() -> None:
    """Equal factors at scalings 1 and 3 weigh 1/4 and 3/4: B = 1/4 + 2 * 3/4, A = 1/4 + 3 * 3/4 * 1/2."""
    ones = naive.Part(torch.ones(1, 1), torch.ones(1, 1), 1.0, 100)
    tripled = naive.Part(torch.full((1, 1), 0.5), torch.full((1, 1), 2.0), 3.0, 1)
    got = HETLORA.aggregate(HETLORA.init(before([ones])), updates_of([ones, tripled]), 1).adapter.lora["m"]
    torch.testing.assert_close(got.B.float(), torch.tensor([[1.75]]))
    torch.testing.assert_close((got.scaling * got.A).float(), torch.tensor([[1.375]]))


def test_examples_do_not_count_and_an_update_of_zero_counts_for_nothing() -> None:
    clients = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=i + 1) for i, r in enumerate((4, 2, 1))]
    state = HETLORA.init(start(clients))
    sent = [HETLORA.broadcast(state, c, 1) for c in clients]
    updates = [train(s, c, seed=1) for s, c in zip(sent, clients, strict=True)]
    got = HETLORA.aggregate(state, updates, 1).adapter.lora
    heavy = HETLORA.aggregate(state, [replace(updates[0], num_examples=1000), *updates[1:]], 1).adapter.lora
    idle = replace(updates[1], adapter=replace(updates[1].adapter, lora=sent[1].adapter.lora))
    without = HETLORA.aggregate(state, [updates[0], updates[2]], 1).adapter.lora
    with_idle = HETLORA.aggregate(state, [updates[0], idle, updates[2]], 1).adapter.lora
    for name in SHAPES:
        assert torch.equal(got[name].A, heavy[name].A)
        assert torch.equal(with_idle[name].A, without[name].A)
        assert torch.equal(with_idle[name].B, without[name].B)
        assert not torch.allclose(got[name].B, without[name].B)


def test_where_nothing_moved_all_count_alike() -> None:
    parts = [naive.Part(torch.full((2, 3), float(k)), torch.zeros(4, 2), 1.0, 10**k) for k in (0, 1, 2)]
    got = HETLORA.aggregate(HETLORA.init(before(parts)), updates_of(parts), 1).adapter.lora["m"]
    torch.testing.assert_close((got.scaling * got.A).float(), torch.ones(2, 3))
    assert not got.B.any()


def test_a_client_whose_tail_shrank_is_pruned_for_good() -> None:
    """Rank 4, gamma 1/2: rows 2 and 3 shrink on client 0 and grow on client 1."""
    strategy = HetLora(prune_gamma=0.5)
    clients = [ClientInfo(client_id=i, rank=4, alpha=8.0, rank_pattern={"1.v": 3}) for i in range(2)]
    state = strategy.init(start(clients))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, c, 1), c, 1) for c in clients], 1)
    assert all(
        f.rank == 4 for n, f in strategy.broadcast(state, clients[0], 2).adapter.lora.items() if n != "layers.1.v"
    )

    def reply(client: ClientInfo, size: float) -> ClientUpdate:
        sent = strategy.broadcast(state, client, 2).adapter
        lora = {}
        for name, f in sent.lora.items():
            scale = torch.ones(f.rank)
            scale[math.ceil(f.rank / 2) :] = size
            lora[name] = LoraFactors(scale[:, None] * f.A, f.B * scale, f.scaling)
        return ClientUpdate(client_id=client.client_id, adapter=replace(sent, lora=lora), num_examples=1)

    replies = [reply(clients[0], 0.5), reply(clients[1], 2.0)]
    new = strategy.aggregate(state, replies, 2)
    small, large = (strategy.broadcast(new, client, 3).adapter for client in clients)
    assert {name: f.rank for name, f in small.lora.items()} == dict.fromkeys(SHAPES, 2)
    assert {f.rank for n, f in large.lora.items() if n != "layers.1.v"} == {4}
    assert small.lora["layers.0.q"].scaling == 8.0 / 2
    cut = replies[0].adapter.lora["layers.0.q"]
    halved = {n: LoraFactors(f.A[:2], f.B[:, :2], f.scaling) for n, f in replies[0].adapter.lora.items()}
    by_hand = replace(replies[0], adapter=replace(replies[0].adapter, lora=halved))
    plain = HetLora().aggregate(state, [by_hand, replies[1]], 2)
    assert cut.rank == 4
    for name, f in plain.adapter.lora.items():
        assert torch.equal(f.A, new.adapter.lora[name].A)
        assert torch.equal(f.B, new.adapter.lora[name].B)
    # once more: a quarter of the rank is left, at least one row
    again = strategy.aggregate(new, [replace(reply_of(strategy, new, clients[0], 0.1), client_id=0)], 3)
    assert {f.rank for f in strategy.broadcast(again, clients[0], 4).adapter.lora.values()} == {1}


def reply_of(strategy: HetLora, state: ServerState, client: ClientInfo, size: float) -> ClientUpdate:
    sent = strategy.broadcast(state, client, 3).adapter
    lora = {n: LoraFactors(torch.cat([f.A[:1], size * f.A[1:]]), f.B, f.scaling) for n, f in sent.lora.items()}
    return ClientUpdate(client_id=client.client_id, adapter=replace(sent, lora=lora), num_examples=1)


@pytest.mark.parametrize(
    ("gamma", "rank", "ranks"),
    [(0.7, 16, [12, 9, 7, 5, 4, 3, 3]), (0.55, 20, [11, 7, 4, 3, 2, 2]), (0.5, 3, [2, 1, 1])],
)
def test_each_pruning_starts_from_the_rank_that_is_left(gamma: float, rank: int, ranks: list[int]) -> None:
    """ceil(gamma r) of the rank before: 16 -> 12 -> 9, not ceil(0.49 * 16) = 8; what is kept is what is sent next."""
    strategy = HetLora(prune_gamma=gamma)
    client = ClientInfo(client_id=0, rank=rank, alpha="2r")
    shapes = {"m": (30, 40)}
    state = strategy.init(start([client], shapes=shapes))
    g = torch.Generator().manual_seed(0)
    state = replace(
        state,
        adapter=AdapterState(
            lora={"m": replace(state.adapter.lora["m"], B=torch.randn(30, rank, generator=g))},
        ),
    )
    for number, expected in enumerate(ranks, start=1):
        sent = strategy.broadcast(state, client, number).adapter.lora["m"]
        keep = expected if expected < sent.rank else sent.rank
        size = torch.ones(sent.rank)
        size[keep:] = 0.5
        shrunk = AdapterState(lora={"m": replace(sent, A=size[:, None] * sent.A, B=sent.B * size)})
        state = strategy.aggregate(state, [ClientUpdate(client_id=0, adapter=shrunk, num_examples=1)], number)
        assert strategy.broadcast(state, client, number + 1).adapter.lora["m"].rank == expected


def test_a_gamma_that_is_rounded_away_is_refused() -> None:
    """1 - 1/r < gamma keeps every row: the run would train the penalty, and never prune."""
    clients = [ClientInfo(client_id=i, rank=rank) for i, rank in enumerate((8, 4, 4))]
    HetLora(prune_gamma=0.8).check(clients)
    with pytest.raises(StrategyError, match=r"prune_gamma = 0\.9 prunes nobody.*set it to at most 0\.875, or to 0"):
        HetLora(prune_gamma=0.9).check(clients)


def test_without_gamma_nobody_is_pruned() -> None:
    clients = [ClientInfo(client_id=0, rank=4)]
    strategy = HetLora()
    state = strategy.init(start(clients))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, clients[0], 1), clients[0], 1)], 1)
    assert not state.memory
    with pytest.raises(StrategyError, match=r"prune_gamma = 1\.0, expected 0 .never. or a share below 1"):
        HetLora(prune_gamma=1.0)
