"""raFLoRA: what rounds leave of the components beyond small ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.methods.raflora import RaFlora
from tests.naive import dense as naive
from tests.naive.clients import dense_deltas, start, train
from tests.naive.drawn import before, replies, updates_of
from tests.naive.raflora import Module, energy_beyond

CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_equals_the_dense_sum_of_rank_one_parts(parts: list[naive.Part], more: int) -> None:
    begun = before(parts, more).lora["m"]
    state = RaFlora().init(before(parts, more))
    got = dense_deltas(RaFlora().global_adapter(RaFlora().aggregate(state, updates_of(parts), 1)))["m"]
    twin = Module(begun.A, begun.B, begun.scaling)
    twin.aggregate(parts)
    assert float((got - twin.total()).norm()) <= 1e-6 * (1 + float(twin.total().norm()))


@settings(max_examples=20, deadline=None)
@given(parts=replies())
def test_equal_ranks_are_flexlora(parts: list[naive.Part]) -> None:
    rank = min(len(part.A) for part in parts)
    equal = [naive.Part(part.A[:rank], part.B[:, :rank], part.scaling, part.examples) for part in parts]
    got, plain = (s.aggregate(s.init(before(equal)), updates_of(equal), 1) for s in (RaFlora(), load("flexlora")))
    torch.testing.assert_close(dense_deltas(got.adapter)["m"], dense_deltas(plain.adapter)["m"], rtol=1e-6, atol=1e-6)


def echo(sent: Broadcast, client: ClientInfo) -> ClientUpdate:
    """A client that trained nothing."""
    return ClientUpdate(client_id=client.client_id, adapter=sent.adapter, num_examples=client.num_examples)


def trained(strategy: Strategy) -> ServerState:
    """A state after one round in which everybody trained."""
    state = strategy.init(start(CLIENTS))
    return strategy.aggregate(state, [train(strategy.broadcast(state, c, 1), c, seed=1) for c in CLIENTS], 1)


def update_of(state: ServerState) -> Tensor:
    return dense_deltas(state.adapter)["layers.0.q"]


def test_rounds_without_training_keep_the_energy_beyond_small_ranks() -> None:
    """In flexlora the components that one client alone has shrink in every round by its share of the examples."""
    share = CLIENTS[0].num_examples / sum(client.num_examples for client in CLIENTS)
    beyond: dict[str, list[float]] = {}
    for name in ("raflora", "flexlora"):
        strategy = load(name)
        state = trained(strategy)
        beyond[name] = [energy_beyond(update_of(state), 2)]
        first = update_of(state)
        for number in (2, 3, 4):
            state = strategy.aggregate(state, [echo(strategy.broadcast(state, c, number), c) for c in CLIENTS], number)
            beyond[name].append(energy_beyond(update_of(state), 2))
        if name == "raflora":
            torch.testing.assert_close(update_of(state), first, rtol=1e-4, atol=1e-5)
    assert beyond["raflora"][-1] == pytest.approx(beyond["raflora"][0], rel=1e-4)
    for earlier, later in zip(beyond["flexlora"], beyond["flexlora"][1:], strict=False):
        assert later == pytest.approx(share**2 * earlier, rel=1e-3)


def test_components_that_no_reply_reaches_stay() -> None:
    """The client of rank 4 is absent for two rounds, in which the others train nothing."""
    state = trained(RaFlora())
    first = update_of(state)
    for number in (2, 3):
        sent = [(RaFlora().broadcast(state, client, number), client) for client in CLIENTS[1:]]
        state = RaFlora().aggregate(state, [echo(*each) for each in sent], number)
    torch.testing.assert_close(update_of(state), first, rtol=1e-4, atol=1e-5)
