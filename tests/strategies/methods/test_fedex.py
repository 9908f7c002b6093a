"""FedEx-LoRA: means plus residual are the ideal."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import relative_error
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.methods.fedex import FedEx
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, Run, dense_deltas, start, train
from tests.naive.drawn import before, replies, updates_of
from tests.naive.factored import ideal
from tests.naive.fedavg_zeropad import Module as Zeropad

CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2), compact=st.booleans())
def test_total_is_the_ideal_and_the_adapter_the_padded_means(parts: list[naive.Part], more: int, compact: bool) -> None:
    begun = before(parts, more)
    strategy = Run(FedEx(), compact=compact)
    state = strategy.aggregate(strategy.init(begun), updates_of(parts), 1)
    exact = naive.ideal(parts)
    got = strategy.global_adapter(state)
    assert float((dense_deltas(got)["m"] - exact).norm()) <= 1e-12 * (1 + float(exact.norm()))
    assert relative_error(got.lora, ideal(updates_of(parts))) < 1e-10
    twin = Zeropad(begun.lora["m"].A, begun.lora["m"].B, begun.lora["m"].scaling)
    twin.aggregate(parts)
    adapter = state.adapter.lora["m"]
    torch.testing.assert_close(adapter.scaling * adapter.A, twin.A)
    torch.testing.assert_close(adapter.B, twin.B)
    torch.testing.assert_close(dense_deltas(state.folds.total())["m"], exact - twin.total(), atol=1e-9, rtol=1e-9)


def test_residuals_of_all_rounds_add_up() -> None:
    """In fp32, compacted on the way or not: old folds stay, and the adapter's own update counts once."""
    strategies = [Run(FedEx()), Run(FedEx(), compact=False)]
    states = [s.init(start(CLIENTS)) for s in strategies]
    for round in (1, 2, 3):
        folded = dense_deltas(states[1].folds.total())
        updates = [train(strategies[1].broadcast(states[1], c, round), c, seed=round) for c in CLIENTS]
        states = [s.aggregate(state, updates, round) for s, state in zip(strategies, states, strict=True)]
        exact = dense_deltas(type(states[0].adapter)(lora=ideal(updates)))
        for strategy, state in zip(strategies, states, strict=True):
            got = dense_deltas(strategy.global_adapter(state))
            for name in SHAPES:
                torch.testing.assert_close(got[name], exact[name] + folded.get(name, 0.0), rtol=1e-4, atol=1e-4)
    assert [len(state.folds.parts) for state in states] == [1, 3]
    assert states[0].folds.version == states[1].folds.version == 3


def test_one_client_has_no_residual() -> None:
    client, strategy = CLIENTS[0], FedEx()
    state = strategy.init(start([client]))
    update = train(strategy.broadcast(state, client, 1), client, seed=1)
    state = strategy.aggregate(state, [update], 1)
    for name, residual in dense_deltas(state.folds.total()).items():
        assert float(residual.norm()) < 1e-5 * float(dense_deltas(update.adapter)[name].norm())


def test_without_the_residual_the_means_are_far_off() -> None:
    """What is tested above is not already true of the means."""
    strategy = FedEx()
    state = strategy.init(start(CLIENTS))
    updates = [train(strategy.broadcast(state, c, 1), c, seed=1) for c in CLIENTS]
    state = strategy.aggregate(state, updates, 1)
    assert relative_error(state.adapter.lora, ideal(updates)) > 0.3
    assert relative_error(strategy.global_adapter(state).lora, ideal(updates)) < 1e-5


def test_a_late_client_gets_the_residuals_that_it_lacks() -> None:
    strategy = load("fedex")
    state = strategy.init(start(CLIENTS, shapes={"m": (60, 60)}))
    for round in (1, 2):
        updates = [train(strategy.broadcast(state, c, round), c, seed=round) for c in CLIENTS]
        state = strategy.aggregate(state, updates, round)
    sent = strategy.broadcast(state, ClientInfo(client_id=9, rank=2, known_base_version=1), 3)
    assert (sent.base_version, sent.folds_from, len(sent.folds), sent.steady) == (2, 1, 1, True)
    assert sent.folds[0].lora["m"].rank == 7 + 4


def test_max_rank_bounds_the_folds() -> None:
    strategy = Run(FedEx(), max_rank=3)
    state = strategy.init(start(CLIENTS))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, c, 1), c, seed=1) for c in CLIENTS], 1)
    assert all(f.rank == min(3, *SHAPES[name]) for name, f in state.folds.total().lora.items())
