"""One client against the rest: weights, distances against dense matrices, and what stands out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, delta, keep_factors
from fedlora.exchange import Broadcast, ClientUpdate, Plan
from fedlora.strategies.server import guard


@settings(max_examples=200, deadline=None)
@given(claims=st.lists(st.integers(1, 10**9), min_size=1, max_size=12), most=st.sampled_from([1.0, 1.5, 4.0, 20.0]))
def test_no_client_weighs_more_than_so_many_times_the_others_mean(claims: list[int], most: float) -> None:
    got = guard.weights(dict(enumerate(claims)), most)
    assert got.keys() == set(range(len(claims)))
    assert all(1 <= got[client] <= claim for client, claim in enumerate(claims))
    for client, weight in got.items():
        others = [w for other, w in got.items() if other != client]
        if others and weight > 1 and weight < claims[client]:
            assert weight <= most * sum(others) / len(others)
    cut = [client for client, claim in enumerate(claims) if got[client] < claim]
    assert len({got[client] for client in cut}) <= 1  # one bound for all
    if len(claims) > most + 1:  # one client alone always has a bound that the others decide
        mean = sum(sorted(claims)[:-1]) / (len(claims) - 1)
        assert max(got.values()) <= max(most * mean, 1)


def test_weights_in_numbers() -> None:
    assert guard.weights({0: 10, 1: 10, 2: 10, 3: 10**9}, 4.0) == {0: 10, 1: 10, 2: 10, 3: 40}
    assert guard.weights({0: 10, 1: 20, 2: 30}, 4.0) == {0: 10, 1: 20, 2: 30}
    assert guard.weights({0: 1, 1: 10**9}, 0.0) == {0: 1, 1: 10**9}
    assert guard.weights({7: 5}, 1.0) == {7: 5}


def pair(seed: int, size: float = 1.0, scaling: float = 2.0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(size * torch.randn(3, 7, generator=g), torch.randn(5, 3, generator=g), scaling)


def replied(adapter: AdapterState) -> ClientUpdate:
    return ClientUpdate(client_id=0, adapter=adapter, num_examples=1)


def test_the_move_is_that_of_the_effective_update() -> None:
    start = AdapterState(lora={"m": pair(0), "n": pair(1)}, tensors={"head": torch.zeros(2)})
    end = AdapterState(lora={"m": pair(2), "n": pair(1)}, tensors={"head": torch.tensor([3.0, 4.0])})
    exact = math.hypot(float((delta(end.lora["m"]) - delta(start.lora["m"])).double().norm()), 5.0)
    assert guard.moved(replied(end), Broadcast(round=1, adapter=start)) == pytest.approx(exact, rel=1e-6)
    # a factor that is not sent back is as it was
    sent = Broadcast(round=1, adapter=start, plan=Plan(send=frozenset("B")))
    kept = LoraFactors(start.lora["m"].A, end.lora["m"].B, 2.0)
    exact = math.hypot(float((delta(kept) - delta(start.lora["m"])).norm()), 5.0)
    assert guard.moved(replied(keep_factors(end, {"B"})), sent) == pytest.approx(exact, rel=1e-5)


def test_where_a_factor_stays_on_the_client_the_other_one_counts() -> None:
    """Its B is 0 at the server: whatever A does would not move that product."""
    start = AdapterState(lora={"m": replace(pair(0), B=torch.zeros(5, 3))})
    end = AdapterState(lora={"m": pair(2)})
    sent = Broadcast(round=1, adapter=start, plan=Plan(send=frozenset("A"), keep=frozenset("B")))
    exact = float((end.lora["m"].A - start.lora["m"].A).norm())
    assert guard.moved(replied(keep_factors(end, {"A"})), sent) == pytest.approx(exact, rel=1e-6)


def test_a_move_that_no_number_holds_is_infinite() -> None:
    start = AdapterState(lora={"m": pair(0)})
    end = AdapterState(lora={"m": LoraFactors(torch.full((3, 7), 3e38), torch.full((5, 3), 3e38), 1e300)})
    assert guard.moved(replied(end), Broadcast(round=1, adapter=start)) == math.inf


def test_what_moved_too_far_is_told_with_its_figures() -> None:
    moves = {0: 1.0, 1: 2.0, 2: 1.5, 3: 400.0}
    assert [bool(guard.excess(client, moves, 100.0)) for client in moves] == [False, False, False, True]
    said = guard.excess(3, moves, 100.0)
    assert "by 400, 267 times the median of the others (1.5)" in said
    assert "federation.max-move = 100" in said
    assert not guard.excess(3, moves, 0.0)
    assert not guard.excess(3, {3: 400.0}, 100.0)  # nobody to compare with
    assert not guard.excess(3, {0: 0.0, 1: 0.0, 3: 400.0}, 100.0)  # the others stood still
    assert guard.excess(1, {0: 1.0, 1: math.inf}, 100.0)
    assert not guard.excess(0, {0: 1.0, 1: math.inf}, 100.0)


@pytest.mark.parametrize(
    ("size", "dtype", "out"),
    [(1e5, "auto", False), (1e5, "bf16", False), (1e5, "fp16", True), (1e30, "auto", True), (1.0, "fp16", False)],
)
def test_values_beyond_the_compute_dtype_are_no_update(size: float, dtype: str, out: bool) -> None:
    """1e30 is an fp32 number, and its product with another such factor is none."""
    f = LoraFactors(torch.full((3, 7), size), torch.full((5, 3), size), 1.0)
    update = replied(AdapterState(lora={"m": f}))
    move = guard.moved(update, Broadcast(round=1, adapter=AdapterState(lora={"m": pair(0)})))
    assert bool(guard.overflow(update, move, dtype)) == out


def test_only_who_stands_out_is_suspected() -> None:
    assert guard.suspect({0: 1.0, 1: 5.0, 2: 1.2}) == 1
    assert guard.suspect({0: 1.0, 1: 1.9, 2: 1.2}) is None
    assert guard.suspect({0: 1.0}) is None
    assert guard.suspect({}) is None
