"""FedSVD: the same product on an orthonormal basis that stays trainable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.algebra import whole_svd
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState
from tests.naive.clients import SHAPES, start, train


def turned(before: LoraFactors, b: torch.Tensor) -> LoraFactors:
    """The factors after a round from which the one client came back with this B."""
    reply = LoraFactors(A=torch.empty(0, 0), B=b, scaling=before.scaling)
    state = ServerState(adapter=AdapterState(lora={"m": before}))
    update = ClientUpdate(client_id=0, adapter=AdapterState(lora={"m": reply}), num_examples=1)
    return load("fedsvd").aggregate(state, [update], 1).adapter.lora["m"]


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 7),
    scaling=st.sampled_from([0.3, 1.0, 2.0]),
    alive=st.integers(1, 7),
    seed=st.integers(0, 9999),
)
def test_rows_are_orthonormal_and_the_product_stays(
    d_out: int, d_in: int, rank: int, scaling: float, alive: int, seed: int
) -> None:
    """Also with r above min(d), and where some columns of B are zero, or depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator)
    B = torch.randn(d_out, rank, generator=generator)
    B[:, min(alive, rank) :] = 0.0
    if seed % 2 and min(alive, rank) > 1:
        B[:, 0] = B[:, 1]
    before = LoraFactors(A=A, B=torch.zeros(d_out, rank), scaling=scaling)
    after = turned(before, B)
    product = scaling * B @ A
    assert after.scaling == scaling
    assert after.A.shape == A.shape
    assert after.B.shape == B.shape
    torch.testing.assert_close(delta(after), product, rtol=1e-5, atol=1e-5 * max(1.0, float(product.norm())))
    # orthonormal as far as the space has room, also where S = 0: no row of A dies with its column of B
    full = min(rank, d_in)
    torch.testing.assert_close(after.A[:full] @ after.A[:full].T, torch.eye(full), rtol=0, atol=1e-5)
    assert not after.A[full:].any()
    # S on the columns of B, in descending order
    gram = scaling**2 * after.B.T @ after.B
    s = torch.linalg.svdvals(product.double())
    expected = torch.zeros(rank).double()
    expected[: min(rank, len(s))] = s[:rank] ** 2
    torch.testing.assert_close(gram.double(), torch.diag(expected), rtol=1e-4, atol=1e-4 * float(1 + s[0] ** 2))
    # no direction that A had is lost
    torch.testing.assert_close(A @ after.A.T @ after.A, A, rtol=1e-4, atol=1e-4)


def test_nothing_learned_keeps_the_seeded_a() -> None:
    before = start([ClientInfo(client_id=0, rank=3)]).lora["layers.0.q"]
    after = turned(before, torch.zeros_like(before.B))
    assert torch.equal(after.A, before.A)


def test_smaller_clients_get_the_best_approximation_of_their_rank() -> None:
    strategy = load("fedsvd")
    large, small = ClientInfo(client_id=0, rank=4, alpha=8), ClientInfo(client_id=1, rank=2, alpha=8)
    state = strategy.init(start([large, small]))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, large, 1), large, 1)], 1)
    sent = strategy.broadcast(state, small, 2).adapter.lora
    for name in SHAPES:
        u, s, vh = torch.linalg.svd(delta(state.adapter.lora[name]).double())
        torch.testing.assert_close(
            delta(sent[name]).double(), (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5 * float(s[0])
        )


def test_the_period_counts_rounds() -> None:
    client, strategy = ClientInfo(client_id=0, rank=2), load("fedsvd", period=3)
    state = strategy.init(start([client]))
    turns = []
    for round in range(1, 8):
        before = state.adapter.lora["layers.0.q"].A
        state = strategy.aggregate(state, [train(strategy.broadcast(state, client, round), client, round)], round)
        turns.append(not torch.equal(state.adapter.lora["layers.0.q"].A, before))
    assert turns == [False, False, True, False, False, True, False]


def test_signs_reproduce() -> None:
    factors = start([ClientInfo(client_id=0, rank=3)]).lora["layers.0.q"]
    factors = LoraFactors(A=factors.A, B=torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), scaling=1.0)
    _, _, vh = whole_svd(factors)
    flipped = whole_svd(LoraFactors(A=-factors.A, B=-factors.B, scaling=1.0))[2]
    torch.testing.assert_close(vh, flipped)
    assert (vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(StrategyError, match="fedsvd's period = 0, expected at least 1"):
        load("fedsvd", period=0)
