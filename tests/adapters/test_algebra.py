"""The adapter algebra against dense matrices and torch.linalg."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import (
    AdapterState,
    LoraFactors,
    compress,
    delta,
    first_ranks,
    initial,
    inner,
    lowrank,
    norm,
    pad,
    relative_error,
    stack,
    truncate,
)
from fedlora.common.errors import AdapterError
from fedlora.exchange import ClientUpdate
from tests.naive import dense as naive
from tests.naive.factored import ideal

some = settings(max_examples=30, deadline=None)


@st.composite
def factors(draw: st.DrawFn, shape: tuple[int, int] | None = None, dtype: torch.dtype = torch.float64) -> LoraFactors:
    """Ranks below, at and above min(d_out, d_in)."""
    d_out, d_in = shape or (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    rank = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    A = torch.randn(rank, d_in, generator=generator, dtype=dtype)
    B = torch.randn(d_out, rank, generator=generator, dtype=dtype)
    return LoraFactors(A=A, B=B, scaling=draw(st.sampled_from([0.25, 1.0, 2.0, 16 / 3])))


@st.composite
def alike(draw: st.DrawFn, least: int = 1) -> list[LoraFactors]:
    """Factors of one module, of any ranks and scalings."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    return [draw(factors(shape)) for _ in range(draw(st.integers(least, 4)))]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@some
@given(f=factors())
def test_delta_norm_and_inner_are_those_of_the_dense_matrix(f: LoraFactors) -> None:
    matrix = naive.product(f.B, f.A, f.scaling)
    close(delta(f), matrix)
    assert norm(f) == pytest.approx(float(matrix.norm()), rel=1e-9)
    assert inner(f, f) == pytest.approx(float((matrix * matrix).sum()), rel=1e-9)


@some
@given(parts=alike(least=2))
def test_inner_of_two_updates(parts: list[LoraFactors]) -> None:
    left, right = delta(parts[0]), delta(parts[1])
    assert inner(parts[0], parts[1]) == pytest.approx(float((left * right).sum()), rel=1e-8, abs=1e-8)


@some
@given(parts=alike(), seed=st.integers(0, 99))
def test_stack_is_the_weighted_sum_of_products(parts: list[LoraFactors], seed: int) -> None:
    weights = torch.randn(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    got = stack(parts, weights)
    assert got.scaling == 1.0
    assert got.rank == sum(part.rank for part in parts)
    close(delta(got), sum(w * delta(p) for w, p in zip(weights, parts, strict=True)) + torch.zeros(1).double())


def test_stack_of_bf16_factors_is_fp32() -> None:
    f = LoraFactors(torch.randn(2, 3).bfloat16(), torch.randn(4, 2).bfloat16(), 1.0)
    got = stack([f], [0.3])
    assert torch.equal(got.A, 0.3 * f.A.float())
    assert torch.equal(got.B, f.B.float())


def test_stacking_what_was_stacked_keeps_every_bit() -> None:
    parts = [LoraFactors(torch.randn(r, 3), torch.randn(4, r), 1.0) for r in (1, 2, 3)]
    once, twice = stack(parts), stack([stack(parts[:2]), parts[2]])
    assert torch.equal(once.A, twice.A)
    assert torch.equal(once.B, twice.B)


@some
@given(parts=alike())
def test_the_qr_route_is_the_svd_of_the_dense_matrix(parts: list[LoraFactors]) -> None:
    f = stack(parts)
    matrix = delta(f)
    u, s, vh = lowrank.qr(f.B, f.scaling * f.A)
    k = min(f.rank, *matrix.shape)
    assert (u.shape, s.shape, vh.shape) == ((matrix.shape[0], k), (k,), (k, matrix.shape[1]))
    close(s, torch.linalg.svdvals(matrix)[:k], 1e-8)
    close((u * s) @ vh, matrix, 1e-8)
    close(u.T @ u, torch.eye(k).double())
    close(vh @ vh.T, torch.eye(k).double())
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()


def test_the_qr_route_of_a_rank_deficient_stack() -> None:
    torch.manual_seed(0)
    f = LoraFactors(torch.randn(2, 9).double(), torch.randn(8, 2).double(), 1.0)
    again = stack([f, f, f])
    u, s, vh = lowrank.qr(again.B, again.A)
    assert s.shape == (6,)
    assert float(s[2]) < 1e-12 * float(s[0])
    close((u * s) @ vh, 3 * delta(f))
    assert compress({"m": again})["m"].rank == 2
    close(delta(compress({"m": again})["m"]), 3 * delta(f))


def test_the_qr_route_signs_do_not_depend_on_the_factorisation() -> None:
    """The same matrix from flipped and mixed factors gives the same vectors."""
    torch.manual_seed(0)
    A, B, mix = torch.randn(3, 7).double(), torch.randn(6, 3).double(), torch.randn(3, 3).double()
    for left, right in zip(lowrank.qr(B, A), lowrank.qr(-B @ mix, torch.linalg.solve(mix, -A)), strict=True):
        close(left, right)


@some
@given(f=factors(), rank=st.integers(1, 8), scaling=st.sampled_from([0.5, 1.0, 4.0]))
def test_truncate_is_the_best_of_its_rank(f: LoraFactors, rank: int, scaling: float) -> None:
    """Eckart-Young; the square root is in both factors and the receiver's scale is divided out once (fault 4)."""
    got = truncate(f, rank, scaling)
    u, s, vh = torch.linalg.svd(delta(f), full_matrices=False)
    close(delta(got), (u[:, :rank] * s[:rank]) @ vh[:rank], 1e-7)
    assert got.scaling == scaling
    assert got.rank == min(rank, f.rank, *delta(f).shape)
    close(got.A.norm(dim=1), got.B.norm(dim=0), 1e-6)


@some
@given(parts=alike())
def test_compress_keeps_the_update_in_at_most_full_rank(parts: list[LoraFactors]) -> None:
    f = stack(parts)
    got = compress({"m": f})["m"]
    assert got.rank <= min(f.rank, *delta(f).shape)
    close(delta(got), delta(f), 1e-5 * (1 + norm(f)))
    assert compress({"m": f}, max_rank=2)["m"].rank <= 2


def falling(d_out: int, d_in: int, rank: int, last: float, seed: int = 0) -> LoraFactors:
    """Factors whose singular values fall from 1 to `last`."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, rank, generator=g, dtype=torch.float64)).Q for d in (d_out, d_in))
    root = torch.logspace(0, math.log10(last), rank, dtype=torch.float64).sqrt()
    return LoraFactors(A=(root[:, None] * right.T).float(), B=(left * root).float(), scaling=1.0)


@pytest.mark.parametrize(
    ("d_out", "d_in", "rank", "last", "clients"),
    [(512, 2048, 16, 1e-4, 10), (64, 11008, 32, 1e-5, 1), (8, 4096, 4, 1e-6, 39), (300, 200, 150, 1e-6, 3)],
)
def test_compress_drops_no_more_than_fp32_rounds(d_out: int, d_in: int, rank: int, last: float, clients: int) -> None:
    """Wide modules, falling singular values, stacks that outgrow the matrix: against the product in fp64."""
    parts = [falling(d_out, d_in, rank, last, seed) for seed in range(clients)]
    whole = stack(parts, [1 / clients] * clients)
    got = compress({"m": whole})["m"]
    exact = whole.B.double() @ whole.A.double()
    lost = float((got.B.double() @ got.A.double() - exact).norm() / exact.norm())
    assert lost < 2e-7  # the factors themselves are rounded to fp32
    assert got.rank <= min(whole.rank, d_out, d_in)


def test_compress_of_nothing_is_rank_1_zeros() -> None:
    got = compress({"m": LoraFactors(torch.randn(3, 5), torch.zeros(4, 3), 2.0)})["m"]
    assert got.rank == 1
    assert not delta(got).any()


@some
@given(f=factors(), extra=st.integers(0, 3))
def test_pad_keeps_the_update(f: LoraFactors, extra: int) -> None:
    got = pad(f, f.rank + extra)
    assert got.rank == f.rank + extra
    close(delta(got), delta(f))
    close(delta(first_ranks(got, f.rank, 0.5)), delta(f))
    if f.rank > 1:
        with pytest.raises(AdapterError, match="cannot pad"):
            pad(f, f.rank - 1)


def test_first_ranks_divides_the_receivers_scale_out_once() -> None:
    f = LoraFactors(torch.randn(4, 4).double(), torch.randn(4, 4).double(), 2.0)
    got = first_ranks(f, 2, 8.0)
    assert (got.rank, got.scaling) == (2, 8.0)
    close(delta(got), 2.0 * f.B[:, :2] @ f.A[:2])
    with pytest.raises(AdapterError, match="cannot take 5 rows"):
        first_ranks(f, 5, 1.0)


def test_fault_7_square_factors_are_told_apart_by_name_not_shape() -> None:
    """d_out = d_in = r: every step must still tell A from B."""
    torch.manual_seed(0)
    f, g = (LoraFactors(torch.randn(3, 3).double(), torch.randn(3, 3).double(), 2.0) for _ in range(2))
    close(delta(stack([f, g])), delta(f) + delta(g))
    close(delta(truncate(f, 3)), delta(f))
    close(delta(pad(f, 5)), delta(f))
    close(delta(compress({"m": f})["m"]), delta(f), 1e-6)


def test_initial_is_as_peft_draws_it() -> None:
    """PEFT: torch.nn.init.kaiming_uniform_(A, a=sqrt(5)); B = 0."""
    shapes = {"b": (4, 9), "a": (400, 300)}
    got = initial(shapes, {"a": 64, "b": 2}, lambda name: 0.5, torch.Generator().manual_seed(3))
    for name in ("a", "b"):
        assert got.lora[name].B.shape == (shapes[name][0], got.lora[name].rank)
        assert not got.lora[name].B.any()
        assert got.lora[name].scaling == 0.5
    generator = torch.Generator().manual_seed(3)
    for name, rank in (("a", 64), ("b", 2)):  # drawn in sorted order
        expected = torch.empty(rank, shapes[name][1])
        torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=generator)
        close(got.lora[name].A, expected, 1e-6)
    other = initial(
        dict(reversed(shapes.items())), {"a": 64, "b": 2}, {"a": 1.0, "b": 1.0}, torch.Generator().manual_seed(3)
    )
    assert all(torch.equal(other.lora[name].A, got.lora[name].A) for name in shapes)


def replies(modules: dict[str, list[LoraFactors]], examples: list[int]) -> list[ClientUpdate]:
    return [
        ClientUpdate(
            client_id=i,
            adapter=AdapterState(lora={name: parts[i] for name, parts in modules.items() if i < len(parts)}),
            num_examples=n,
        )
        for i, n in enumerate(examples)
    ]


@some
@given(parts=alike(least=2))
def test_ideal_weighs_every_module_over_the_clients_that_sent_it(parts: list[LoraFactors]) -> None:
    examples = [3 * i + 1 for i in range(len(parts))]
    got = ideal(iter(replies({"all": parts, "some": parts[:1]}, examples)))
    expected = naive.ideal([naive.Part(p.A, p.B, p.scaling, n) for p, n in zip(parts, examples, strict=True)])
    close(delta(got["all"]), expected, 1e-9)
    close(delta(got["some"]), delta(parts[0]))


@some
@given(first=alike(least=2), second=alike(least=2))
def test_relative_error_is_that_of_the_dense_matrices(first: list[LoraFactors], second: list[LoraFactors]) -> None:
    aggregate, exact = {"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]}
    missed = sum(float((delta(aggregate[n]) - delta(exact[n])).square().sum()) for n in exact)
    whole = sum(float(delta(exact[n]).square().sum()) for n in exact)
    assert relative_error(aggregate, exact) == pytest.approx((missed / whole) ** 0.5, rel=1e-8)


def test_relative_error_is_exact_near_zero() -> None:
    """Squares and Gram matrices would stop at 1e-8."""
    torch.manual_seed(0)
    exact = LoraFactors(torch.randn(4, 30).double(), torch.randn(20, 4).double(), 2.0)
    near = LoraFactors(exact.A * (1 + 1e-12), exact.B, 2.0)
    assert relative_error({"m": exact}, {"m": exact}) < 1e-15
    assert relative_error({"m": near}, {"m": exact}) == pytest.approx(1e-12, rel=1e-2)


def test_relative_error_of_missing_modules_and_of_nothing() -> None:
    f = LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    zero = LoraFactors(torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    assert relative_error({}, {"m": f}) == pytest.approx(1.0)
    assert relative_error({"m": zero}, {"m": zero}) == 0.0
    assert relative_error({"m": f}, {"m": zero}) == math.inf


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("limit", [0, 12, 30])
def test_compress_keeps_an_update_of_full_rank_as_a_matrix_beside_an_identity(d_out, d_in, limit):
    g = torch.Generator().manual_seed(3)
    wide = LoraFactors(torch.randn(25, d_in, generator=g), torch.randn(d_out, 25, generator=g), scaling=0.5)
    small = compress({"m": wide}, limit)["m"]
    assert small.rank == 12
    exact = 0.5 * wide.B.double() @ wide.A.double()
    assert float((small.B.double() @ small.A.double() - exact).norm()) <= 2**-24 * float(exact.norm())
    assert any(torch.equal(factor, torch.eye(12)) for factor in (small.A, small.B))


def test_compress_finds_the_rank_of_many_dependent_factors():
    g = torch.Generator().manual_seed(3)
    one = LoraFactors(torch.randn(5, 20, generator=g), torch.randn(12, 5, generator=g), scaling=1.0)
    small = compress({"m": stack([one] * 4, [1.0, 2.0, 3.0, 4.0])})["m"]
    assert small.rank == 5
    torch.testing.assert_close(small.B @ small.A, 10 * one.B @ one.A, rtol=0, atol=1e-4)
