"""Sums of sketches against the dense matrices that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import LoraFactors, delta
from fedlora.adapters.sketched_sum import (
    HELD_BACK,
    Recovered,
    Sketch,
    basis_of,
    loss,
    omega,
    psi,
    recover,
    size,
    sketched,
)
from tests.naive import sketched_sum as naive
from tests.naive.dense import Part

SHAPE = (60, 90)
RANKS = (4, 3, 2, 1)


def clients(seed: int, shape: tuple[int, int] = SHAPE, ranks: Sequence[int] = RANKS, falls: float = 0.7) -> list[Part]:
    """Clients of unequal ranks and weights, whose components fall off."""
    g = torch.Generator().manual_seed(seed)
    parts: list[Part] = []
    for k, rank in enumerate(ranks):
        A, B = torch.randn(rank, shape[1], generator=g), torch.randn(shape[0], rank, generator=g)
        parts.append(Part(A, B * falls ** torch.arange(rank), 2.0 / rank, 3 + k))
    return parts


def added(parts: Sequence[Part], sketch: Sketch, second: bool, bases: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted mean of what each client sends, added up one by one."""
    examples = sum(part.examples for part in parts)
    sums: dict[str, Tensor] = {}
    for part in parts:
        factors = LoraFactors(part.A, part.B, part.scaling)
        names = (sketch.second if second else sketch.first)((len(part.B), part.A.shape[1]))
        for name, tensor in sketched(factors, names, sketch, bases).items():
            assert tuple(tensor.shape) == names[name]
            assert tensor.dtype == torch.float32
            sums[name] = sums.get(name, 0) + part.examples / examples * tensor.double()
    return sums


def recovered(parts: Sequence[Part], sketch: Sketch) -> Recovered:
    sums, basis = added(parts, sketch, second=False), None
    if sketch.passes == 2:
        if "Y" in sums:
            basis = basis_of(sums["Y"], sketch).float()
        sums |= added(parts, sketch, second=True, bases=basis)
    return recover(sums, sketch, basis)


def matrix(factors: LoraFactors) -> np.ndarray:
    return (factors.scaling * (factors.B.double() @ factors.A.double())).numpy()


@pytest.mark.parametrize("passes", [1, 2])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), more=st.integers(0, 5), ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_width_of_all_ranks_loses_nothing(passes: int, seed: int, more: int, ranks: list[int]) -> None:
    parts = clients(seed, ranks=ranks)
    found = recovered(parts, Sketch(sum(ranks) + more, passes, seed))
    assert naive.apart(matrix(found.factors), naive.ideal(parts)) < 1e-5
    assert loss({"m": found}) < 1e-5
    assert found.factors.rank == sum(ranks)  # what is rounding is not kept


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("width", [3, 6, 9, 12])
def test_it_is_what_the_dense_sketch_recovers(passes: int, width: int) -> None:
    parts, sketch = clients(3), Sketch(width, passes, 77)
    exact = naive.ideal(parts)
    right, left = omega(sketch, SHAPE[1])[:, :width].numpy(), psi(sketch, SHAPE[0]).numpy()
    expected = naive.one_pass(exact, right, left) if passes == 1 else naive.two_passes(exact, right)
    assert naive.apart(matrix(recovered(parts, sketch).factors), expected) < 1e-5


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_below_that_width_the_loss_is_stated_within_a_factor_of_two(passes: int, width: int) -> None:
    for seed in range(12):
        modules = {f"m{i}": clients(100 * seed + i) for i in range(6)}
        found = {name: recovered(parts, Sketch(width, passes, seed)) for name, parts in modules.items()}
        missed = [np.linalg.norm(matrix(found[n].factors) - naive.ideal(p)) for n, p in modules.items()]
        whole = [np.linalg.norm(naive.ideal(p)) for p in modules.values()]
        true = math.hypot(*missed) / math.hypot(*whole)
        assert true > 0.01
        assert true / 2 < loss(found) < 2 * true


def test_the_estimates_are_right_on_average() -> None:
    parts, exact = clients(5), naive.ideal(clients(5))
    for passes in (1, 2):
        ratios: list[tuple[float, float]] = []
        for seed in range(150):
            found = recovered(parts, Sketch(4, passes, seed))
            missed = np.linalg.norm(matrix(found.factors) - exact) ** 2
            ratios.append((found.lost / missed, found.energy / np.linalg.norm(exact) ** 2))
        lost, energy = np.mean(ratios, axis=0)
        assert lost == pytest.approx(1.0, abs=0.12)
        assert energy == pytest.approx(1.0, abs=0.12)


def test_two_passes_lose_less_than_one_and_neither_less_than_the_nearest_matrix() -> None:
    one, two = [], []
    for seed in range(10):
        parts, width = clients(seed), 5
        exact = naive.ideal(parts)
        least = naive.apart(naive.nearest(exact, width), exact)
        errors = [naive.apart(matrix(recovered(parts, Sketch(width, p, seed)).factors), exact) for p in (1, 2)]
        assert least < errors[1] < errors[0]
        one.append(errors[0])
        two.append(errors[1])
    assert np.mean(two) < 0.9 * np.mean(one)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_matrix_that_is_no_larger_than_its_sketches_is_sent_whole(passes: int) -> None:
    shape = (12, 20)
    parts, sketch = clients(1, shape), Sketch(6, passes, 0)
    assert sketch.whole(shape)
    assert sketch.first(shape) == ({"D": shape} if passes == 1 else {})
    assert sketch.second(shape) == ({} if passes == 1 else {"D": shape})
    found = recovered(parts, sketch)
    assert naive.apart(matrix(found.factors), naive.ideal(parts)) < 1e-5
    assert found.lost == 0.0


@given(width=st.integers(1, 400), d_out=st.integers(1, 600), d_in=st.integers(1, 600), passes=st.sampled_from([1, 2]))
def test_a_sketch_never_has_more_numbers_than_the_matrix_and_always_fits(
    width: int, d_out: int, d_in: int, passes: int
) -> None:
    sketch, shape = Sketch(width, passes, 0), (d_out, d_in)
    sent = [*sketch.first(shape).values(), *sketch.second(shape).values()]
    assert sum(math.prod(each) for each in sent) <= d_out * d_in
    if not sketch.whole(shape):
        assert width + HELD_BACK <= d_in
        assert passes == 2 or 2 * width + 1 <= d_out


def test_nothing_learned_is_nothing_recovered() -> None:
    parts = [Part(p.A, 0 * p.B, p.scaling, p.examples) for p in clients(0)]
    for passes in (1, 2):
        found = recovered(parts, Sketch(5, passes, 0))
        assert found.factors.rank == 1
        assert not delta(found.factors).any()
        assert loss({"m": found}) == 0.0


def test_means_of_factors_are_padded_with_the_scale_in_a() -> None:
    [part] = clients(0, ranks=(3,))
    sent = sketched(LoraFactors(part.A, part.B, 0.5), {"A": (5, SHAPE[1]), "B": (SHAPE[0], 5)}, Sketch(4, 1, 0, 5))
    assert torch.equal(sent["A"], torch.cat([0.5 * part.A, torch.zeros(2, SHAPE[1])]))
    assert torch.equal(sent["B"], torch.cat([part.B, torch.zeros(SHAPE[0], 2)], dim=1))


def test_what_is_drawn_is_orthonormal_and_the_same_everywhere() -> None:
    sketch = Sketch(20, 1, 42)
    right, left = omega(sketch, 90), psi(sketch, 60)
    torch.testing.assert_close(right.T @ right, torch.eye(28, dtype=torch.float64))
    torch.testing.assert_close(left @ left.T, torch.eye(41, dtype=torch.float64))
    known = torch.tensor(KNOWN, dtype=torch.float64)  # as this was written, with torch 2.13.0 on x86
    torch.testing.assert_close(torch.stack([right[0, 0], right[50, 27], left[0, 0], left[40, 59]]), known)
    assert not torch.allclose(omega(Sketch(20, 1, 43), 90), right)


KNOWN: Sequence[float] = (0.11573788636156, -0.17495698878144, 0.16231748500915, -0.18338256741431)


def test_the_sums_of_two_passes_show_the_sketch_of_a_client_that_is_lost_between_them() -> None:
    """Why secure sums take one pass: both sums give `Y - Q (P' Omega)`, whose masks would be gone."""
    parts, sketch = clients(0), Sketch(width=sum(RANKS), passes=2, seed=0)
    *stayed, lost = parts
    total = sum(part.examples for part in parts)
    Y = total * added(parts, sketch, second=False)["Y"]
    Q = basis_of(Y, sketch)
    P = (total - lost.examples) * added(stayed, sketch, second=True, bases=Q)["P"]
    seen = (Y - Q @ (P.T @ omega(sketch, SHAPE[1]))) / lost.examples
    own = sketched(LoraFactors(lost.A, lost.B, lost.scaling), sketch.first(SHAPE), sketch)["Y"].double()
    assert (seen - own).norm() < 1e-4 * own.norm()


@pytest.mark.parametrize("name", ["Y", "Z"])
def test_a_sketch_tells_the_size_of_an_update(name: str) -> None:
    ratios: list[float] = []
    for seed in range(40):
        sketch = Sketch(10, 1, seed)
        [part] = clients(seed, ranks=(4,))
        factors = LoraFactors(part.A, part.B, 1.0)
        sent: Mapping[str, Tensor] = sketched(factors, sketch.first(SHAPE), sketch)
        ratios.append(size({name: sent[name]}, sketch, SHAPE) / float(delta(factors).norm()))
    assert np.mean(np.square(ratios)) == pytest.approx(1.0, abs=0.1)
    assert 0.5 < min(ratios) < max(ratios) < 1.6
