"""Folds: versions, what a client lacks, and compaction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.folds import Folds, concatenate


def fold(seed: int, rank: int = 2, shape: tuple[int, int] = (9, 7), names: tuple[str, ...] = ("m",)) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        lora={
            name: LoraFactors(
                torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator), 1.0
            )
            for name in names
        }
    )


def test_versions_count_folds() -> None:
    folds = Folds()
    assert folds.version == 0
    for version in (1, 2, 3):
        folds = folds.push(fold(version))
        assert (folds.version, len(folds.parts), folds.first) == (version, version, 1)


def test_since_gives_what_a_client_lacks() -> None:
    folds = Folds().push(fold(1)).push(fold(2)).push(fold(3))
    assert folds.since(3) == (3, ())
    assert folds.since(2) == (2, folds.parts[2:])
    assert folds.since(1) == (1, folds.parts[1:])
    assert folds.since(0) == (0, folds.parts)
    assert Folds().since(0) == (0, ())


def test_a_client_of_an_unknown_version_starts_anew() -> None:
    """One that is ahead of a server which started again holds other folds."""
    folds = Folds().push(fold(1))
    assert folds.since(5) == (0, folds.parts)
    assert Folds().since(5) == (0, ())


@settings(max_examples=20, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=8), max_rank=st.integers(0, 8))
def test_compaction_keeps_the_version_and_bounds_the_rank(ranks: list[int], max_rank: int) -> None:
    folds, exact = Folds(max_rank=max_rank), torch.zeros(9, 7)
    for i, rank in enumerate(ranks):
        folds = folds.push(fold(i, rank))
        exact = exact + delta(fold(i, rank).lora["m"])
        assert folds.version == i + 1
        assert folds.total().lora["m"].rank <= min(max_rank or 7, 7)
    if not max_rank:
        torch.testing.assert_close(delta(folds.total().lora["m"]), exact, rtol=1e-4, atol=1e-4)


def test_after_compaction_older_clients_get_everything() -> None:
    folds = Folds().push(fold(1, 4)).push(fold(2, 4))  # 8 > 7
    assert (len(folds.parts), folds.first, folds.version) == (1, 2, 2)
    assert folds.since(1) == (0, folds.parts)
    assert folds.since(2) == (2, ())
    grown = replace(folds, compact=False).push(fold(3, 1))
    assert grown.since(2) == (2, grown.parts[1:])
    assert grown.since(1) == (0, grown.parts)


def test_one_fold_beyond_full_rank_is_compacted_at_once() -> None:
    folds = Folds().push(fold(1, 20))
    assert folds.total().lora["m"].rank == 7
    torch.testing.assert_close(delta(folds.total().lora["m"]), delta(fold(1, 20).lora["m"]), rtol=1e-4, atol=1e-4)


def test_without_compaction_every_fold_stays_as_it_came() -> None:
    folds = Folds(max_rank=1, compact=False)
    for i in range(6):
        folds = folds.push(fold(i, 4))
    assert len(folds.parts) == 6
    assert all(part.lora["m"].rank == 4 for part in folds.parts)


def test_max_rank_keeps_the_best_approximation() -> None:
    first, second = fold(1, 3), fold(2, 3)
    folds = Folds(max_rank=4).push(first).push(second)
    exact = delta(first.lora["m"]) + delta(second.lora["m"])
    tail = float(torch.linalg.svdvals(exact)[4:].norm())
    assert float((delta(folds.total().lora["m"]) - exact).norm()) == pytest.approx(tail, rel=1e-4)


def test_concatenating_in_steps_gives_the_same_bits() -> None:
    parts = tuple(fold(i, i + 1) for i in range(4))
    at_once, in_steps = concatenate(parts), AdapterState()
    for part in parts:
        in_steps = concatenate((in_steps, part))
    assert torch.equal(at_once.lora["m"].A, in_steps.lora["m"].A)
    assert torch.equal(at_once.lora["m"].B, in_steps.lora["m"].B)


def test_folds_may_have_different_modules() -> None:
    folds = Folds().push(fold(1, names=("a", "b"))).push(fold(2, names=("b", "c")))
    total = folds.total()
    assert {name: f.rank for name, f in total.lora.items()} == {"a": 2, "b": 4, "c": 2}
    expected = delta(fold(1, names=("a", "b")).lora["b"]) + delta(fold(2, names=("b", "c")).lora["b"])
    torch.testing.assert_close(delta(total.lora["b"]), expected)


def test_push_leaves_the_old_folds_as_they_were() -> None:
    before = Folds().push(fold(1, 4))
    before.push(fold(2, 4))
    assert before.version == 1
    assert torch.equal(before.parts[0].lora["m"].A, fold(1, 4).lora["m"].A)


@pytest.mark.parametrize("step", [2e-4, 1e-6])
def test_a_small_direction_that_every_round_repeats_adds_up(step: float) -> None:
    """100 rounds of a large update elsewhere and the same small one, with a compaction in most of them."""
    d_out, d_in, rounds = 8, 4096, 100
    g = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(d_in, 4, generator=g, dtype=torch.float64)).Q.T
    columns = torch.linalg.qr(torch.randn(d_out, 4, generator=g, dtype=torch.float64)).Q
    sizes = torch.tensor([1 / rounds, 0.5 / rounds, 0.2 / rounds, step], dtype=torch.float64)
    part = LoraFactors(A=(sizes[:, None] * rows).float(), B=columns.float(), scaling=1.0)
    folds = Folds()
    for _ in range(rounds):
        folds = folds.push(AdapterState(lora={"m": part}))
    learned = folds.total().lora["m"]
    assert learned.rank <= d_out
    small = float(columns[:, 3] @ (learned.B.double() @ (learned.A.double() @ rows[3])))
    assert small == pytest.approx(rounds * step, rel=1e-2 if step < 1e-5 else 1e-3)
