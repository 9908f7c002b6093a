"""FLoRIST: the smallest rank that keeps the energy, folded as FLoRA folds its stack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.methods.florist import Florist, energy_rank
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, Run, dense_deltas, start, train
from tests.naive.drawn import before, replies, updates_of
from tests.naive.flexlora import best
from tests.naive.florist import smallest_rank

TAUS = (0.5, 0.9, 0.99, 1.0)
CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


@settings(max_examples=40, deadline=None)
@given(parts=replies(), tau=st.sampled_from(TAUS))
def test_a_fold_is_the_smallest_part_with_the_energy(parts: list[naive.Part], tau: float) -> None:
    strategy = Florist(tau=tau)
    fold = strategy.aggregate(strategy.init(before(parts)), updates_of(parts), 1).folds.total()
    exact, size = naive.ideal(parts), float(naive.ideal(parts).norm())
    missed = float((dense_deltas(fold)["m"] - exact).norm())
    assert missed**2 <= (1 - tau) * size**2 + 1e-12 * size**2
    if tau < 1:  # at 1, the components that rounding makes do not count as energy in the same way twice
        rank = smallest_rank(exact, tau)
        assert fold.lora["m"].rank == rank
        torch.testing.assert_close(dense_deltas(fold)["m"], best(exact, rank), rtol=1e-6, atol=1e-6 * size)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=8).map(lambda v: sorted(v, reverse=True)),
    tau=st.floats(0.01, 1.0),
)
def test_energy_rank_is_enough_and_no_more(values: list[float], tau: float) -> None:
    k = energy_rank(torch.tensor(values, dtype=torch.float64), tau)
    energy = [v * v for v in values]
    assert sum(energy[:k]) >= tau * sum(energy) * (1 - 1e-12)
    assert k == 1 or sum(energy[: k - 1]) < tau * sum(energy) * (1 + 1e-12)


def test_energy_rank_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, 1.0])  # energies 9, 1, 1 of 11
    assert [energy_rank(values, tau) for tau in (0.5, 9 / 11, 0.82, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert energy_rank(torch.zeros(4), 0.9) == 1
    assert energy_rank(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1


def test_at_tau_1_it_is_flora() -> None:
    """The same model, restarts and base versions over rounds, up to fp32's rounding."""
    florist, flora = Run(Florist(tau=1.0), seed=5), Run(Flora(), seed=5)
    states = [s.init(start(CLIENTS)) for s in (florist, flora)]
    for round in (1, 2, 3):
        updates = [train(flora.broadcast(states[1], c, round), c, seed=round) for c in CLIENTS]
        states = [s.aggregate(state, updates, round) for s, state in zip((florist, flora), states, strict=True)]
        left, right = (dense_deltas(s.global_adapter(st)) for s, st in zip((florist, flora), states, strict=True))
        for name in SHAPES:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-4)
        for c in CLIENTS:
            mine, theirs = florist.broadcast(states[0], c, round + 1), flora.broadcast(states[1], c, round + 1)
            assert mine.base_version == theirs.base_version == round
            for name, factors in mine.adapter.lora.items():
                assert torch.equal(factors.A, theirs.adapter.lora[name].A)
                assert not factors.B.any()


def test_one_client_keeps_its_strongest_components() -> None:
    """Singular values 10 and 0.1: one component has 99.99 % of the energy."""
    part = naive.Part(torch.eye(2, 5), torch.eye(6, 2) @ torch.diag(torch.tensor([10.0, 0.1])), 1.0, 7)
    strategy = Florist()
    fold = strategy.aggregate(strategy.init(before([part])), updates_of([part]), 1).folds.total()
    expected = torch.zeros(6, 5).double()
    expected[0, 0] = 10.0
    assert fold.lora["m"].rank == 1
    torch.testing.assert_close(dense_deltas(fold)["m"], expected)


def test_max_rank_and_compact_bound_the_folds_as_in_flora() -> None:
    for options, count in (({"max_rank": 2}, 1), ({"compact": False}, 2)):
        strategy = Run(load("florist"), **options)
        state = strategy.init(start(CLIENTS))
        for round in (1, 2):
            updates = [train(strategy.broadcast(state, c, round), c, seed=round) for c in CLIENTS]
            state = strategy.aggregate(state, updates, round)
        assert (len(state.folds.parts), state.folds.version) == (count, 2)
        if count == 1:
            assert all(f.rank <= 2 for f in state.folds.total().lora.values())


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.001, float("nan")])
def test_a_wrong_tau_is_refused(tau: float) -> None:
    with pytest.raises(StrategyError, match=r"tau = .*expected a number above 0, at most 1"):
        load("florist", tau=tau)
