"""FLoRA: exact folds, restarts, and what the folds' limits do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, relative_error
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.tools.restarts import restart
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, Run, dense_deltas, start, train
from tests.naive.factored import ideal

FLORA = load("flora")
CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    clients=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([0.25, 1.0, 3.0]), st.integers(1, 50)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 999),
)
def test_a_fold_is_the_ideal(shape: tuple[int, int], clients: list[tuple[int, float, int]], seed: int) -> None:
    """Any ranks and scalings, also R > min(d), where the folds are compacted at once, and d = r (fault 7)."""
    torch.manual_seed(seed)
    parts = [naive.Part(torch.randn(r, shape[1]), torch.randn(shape[0], r), s, n) for r, s, n in clients]
    updates = [
        ClientUpdate(
            client_id=i, adapter=AdapterState(lora={"m": LoraFactors(p.A, p.B, p.scaling)}), num_examples=p.examples
        )
        for i, p in enumerate(parts)
    ]
    state = FLORA.aggregate(FLORA.init(AdapterState()), updates, 1)
    got = FLORA.global_adapter(state)
    torch.testing.assert_close(dense_deltas(got)["m"], naive.ideal(parts), rtol=1e-5, atol=2e-5)
    assert got.lora["m"].rank <= max(min(shape), 1)
    assert relative_error(got.lora, ideal(updates)) < 1e-5


def test_fault_2_one_alpha_and_unequal_ranks_keep_their_effective_scales() -> None:
    """alpha = 16 at ranks 4, 2, 1 means scales 4, 8, 16: a mean of B_k A_k alone is far off."""
    state = FLORA.init(start(CLIENTS))
    updates = [train(FLORA.broadcast(state, c, 1), c, seed=1) for c in CLIENTS]
    got = dense_deltas(FLORA.global_adapter(FLORA.aggregate(state, updates, 1)))
    for name in SHAPES:
        factors = [update.adapter.lora[name] for update in updates]
        assert [f.scaling for f in factors] == [4.0, 8.0, 16.0]
        parts = [naive.Part(f.A, f.B, f.scaling, u.num_examples) for f, u in zip(factors, updates, strict=True)]
        unscaled = [replace(part, scaling=1.0) for part in parts]
        torch.testing.assert_close(got[name], naive.ideal(parts), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[name], naive.ideal(unscaled), rtol=0.1, atol=0.1)


def test_the_restart_is_random_by_seed_and_round_and_the_same_for_every_client() -> None:
    state = FLORA.init(start(CLIENTS))
    first = state.adapter
    updates = [train(FLORA.broadcast(state, c, 1), c, seed=1) for c in CLIENTS]
    second = FLORA.aggregate(state, updates, 1)
    other_seed = FLORA.aggregate(replace(state, seed=1), updates, 1)
    third = FLORA.aggregate(second, [train(FLORA.broadcast(second, c, 2), c, seed=2) for c in CLIENTS], 2)
    for name, (d_out, d_in) in SHAPES.items():
        A = second.adapter.lora[name].A
        for different in (first, other_seed.adapter, third.adapter):
            assert not torch.allclose(A, different.lora[name].A)
        assert A.shape == (4, d_in)
        assert A.abs().max() <= d_in**-0.5
        assert torch.equal(second.adapter.lora[name].B, torch.zeros(d_out, 4))
        for c in CLIENTS:
            sent = FLORA.broadcast(second, c, 2).adapter.lora[name]
            assert torch.equal(sent.A, A[: c.rank])  # as drawn, whatever the client's scaling
            assert not sent.B.any()
            assert sent.scaling == c.scaling_of(name)


def test_the_restart_depends_on_both_seed_and_round_beyond_32_bits() -> None:
    adapter = start(CLIENTS)
    drawn = [restart(adapter, s, r).lora["layers.0.q"].A for s, r in ((0, 1), (1, 0), (2**32, 1), (0, 2**32 + 1))]
    assert all(not torch.allclose(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_round_1_starts_from_the_given_adapter() -> None:
    begun = start(CLIENTS)
    sent = FLORA.broadcast(FLORA.init(begun), CLIENTS[1], 1)
    assert (sent.base_version, sent.folds, sent.folds_from) == (0, (), 0)
    assert all(torch.equal(f.A, begun.lora[name].A[:2]) for name, f in sent.adapter.lora.items())


def test_a_client_gets_only_the_folds_that_it_lacks() -> None:
    shapes = {"m": (40, 40)}
    state = FLORA.init(start(CLIENTS, shapes=shapes))
    for round in (1, 2, 3):
        state = FLORA.aggregate(state, [train(FLORA.broadcast(state, c, round), c, seed=round) for c in CLIENTS], round)
    for known, count in ((0, 3), (1, 2), (2, 1), (3, 0)):
        sent = FLORA.broadcast(state, replace(CLIENTS[0], known_base_version=known), 4)
        assert (sent.base_version, sent.folds_from, len(sent.folds)) == (3, known, count)
        assert all(fold.lora["m"].rank == 7 for fold in sent.folds)


def test_max_rank_bounds_the_folds_and_keeps_the_largest_part() -> None:
    strategy = Run(Flora(), max_rank=3)
    state = strategy.init(start(CLIENTS))
    updates = [train(strategy.broadcast(state, c, 1), c, seed=1) for c in CLIENTS]
    kept = strategy.aggregate(state, updates, 1).folds.total()
    for name, shape in SHAPES.items():
        rank = min(3, *shape)
        assert kept.lora[name].rank == rank
        f = [u.adapter.lora[name] for u in updates]
        exact = naive.ideal([naive.Part(p.A, p.B, p.scaling, u.num_examples) for p, u in zip(f, updates, strict=True)])
        tail = torch.linalg.svdvals(exact)[rank:].norm()
        assert float((dense_deltas(kept)[name] - exact).norm()) == pytest.approx(float(tail), rel=1e-4, abs=1e-4)


def test_a_client_of_a_larger_rank_than_the_run_is_refused() -> None:
    with pytest.raises(StrategyError, match="client 9 has rank 8, the server holds rank 4"):
        FLORA.broadcast(FLORA.init(start(CLIENTS)), ClientInfo(client_id=9, rank=8), 1)


def test_global_adapter_holds_an_untaken_adapter_too() -> None:
    """Factors with B != 0 that no fold holds yet count once, at scaling 1."""
    state = FLORA.init(start(CLIENTS))
    state = FLORA.aggregate(state, [train(FLORA.broadcast(state, c, 1), c, seed=1) for c in CLIENTS], 1)
    folded = dense_deltas(FLORA.global_adapter(state))
    moved = {n: LoraFactors(f.A, torch.ones_like(f.B), f.scaling) for n, f in state.adapter.lora.items()}
    got = FLORA.global_adapter(replace(state, adapter=AdapterState(lora=moved)))
    for name, factors in moved.items():
        expected = folded[name] + naive.product(factors.B, factors.A, factors.scaling)
        torch.testing.assert_close(dense_deltas(got)[name], expected, rtol=1e-4, atol=1e-4)
        assert got.lora[name].scaling == 1.0
