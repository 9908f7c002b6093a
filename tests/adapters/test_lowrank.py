"""SVD of products: every route against the dense decomposition, and where the fast one would lose digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import LoraFactors, lowrank, svd_each

ROUTES = {"gram": lowrank.gram, "qr": lowrank.qr, "dense": lowrank.dense, "product_svd": lowrank.product_svd}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(svd: lowrank.Svd) -> Tensor:
    u, s, vh = svd
    return (u * s[..., None, :]) @ vh


@pytest.mark.parametrize("route", ["gram", "dense", "product_svd"])
@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    R=st.integers(1, 9),
    rank=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_svd(route: str, d_out: int, d_in: int, R: int, rank: int, seed: int) -> None:
    B, A = normal(d_out, R, seed=seed), normal(R, d_in, seed=seed + 1)
    if {"gram": min(d_out, d_in) < R, "dense": min(d_out, d_in) > R}.get(route):
        return
    u, s, vh = ROUTES[route](B, A, rank)
    exact = torch.linalg.svd(B @ A, full_matrices=False)
    k = min(rank or R, R, d_out, d_in)
    assert (u.shape, s.shape, vh.shape) == ((d_out, k), (k,), (k, d_in))
    top = float(exact.S[0])
    torch.testing.assert_close(s, exact.S[:k], rtol=1e-6, atol=1e-7 * top)
    best = (exact.U[:, :k] * exact.S[:k]) @ exact.Vh[:k]
    if k == min(R, d_out, d_in) or float(exact.S[k - 1] - exact.S[k]) > 1e-3 * top:  # else the best is not unique
        torch.testing.assert_close(rebuilt((u, s, vh)), best, rtol=0, atol=1e-6 * top)
    alive = s > 1e-4 * top
    torch.testing.assert_close(u[:, alive].T @ u[:, alive], torch.eye(int(alive.sum())).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(vh[alive] @ vh[alive].T, torch.eye(int(alive.sum())).double(), rtol=0, atol=1e-6)
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) >= 0).all()


@pytest.mark.parametrize(
    ("drift", "cancel"), [(0.0, False), *((d, c) for d in (1e-1, 1e-3, 1e-5, 1e-7) for c in (False, True))]
)
def test_near_parallel_clients_keep_fp32_digits(drift: float, cancel: bool) -> None:
    """Clients that hardly differ make Gram matrices that are singular to rounding; differences make terms cancel."""
    A0, B0 = normal(4, 50), normal(40, 4, seed=1)
    sign = -1.0 if cancel else 1.0
    A = torch.cat([A0, sign * (A0 + drift * normal(4, 50, seed=2)), A0 * 0.5 + drift * normal(4, 50, seed=3)])
    B = torch.cat([B0, B0 + drift * normal(40, 4, seed=4), (sign + 1) / 2 * B0 + drift * normal(40, 4, seed=5)], dim=1)
    exact = B @ A
    size = float(exact.norm())
    found = lowrank.product_svd(B, A)
    assert float((rebuilt(found) - exact).norm()) < 3e-7 * size
    torch.testing.assert_close(found[1], torch.linalg.svdvals(exact)[:12], rtol=1e-6, atol=2e-7 * float(found[1][0]))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_unbalanced_factors_do_no_harm(scale: float) -> None:
    """A client with a huge B and a tiny A counts by its product."""
    B, A = normal(30, 6), normal(6, 20, seed=1)
    sizes = torch.tensor([scale, 1.0, 1 / scale, 1.0, scale, 1.0], dtype=torch.float64)
    found = lowrank.product_svd(B * sizes, A / sizes[:, None])
    torch.testing.assert_close(rebuilt(found), B @ A, rtol=0, atol=1e-8)


def test_zero_rows_and_columns() -> None:
    B, A = normal(9, 4), normal(4, 8, seed=1)
    B[:, 1] = 0
    A[2] = 0
    for route in ROUTES.values():
        u, s, vh = route(B, A)
        torch.testing.assert_close((u * s) @ vh, B @ A)
    u, s, vh = lowrank.product_svd(torch.zeros(9, 4), A)
    assert not u.any()
    assert not s.any()
    assert not vh.any()


def test_a_batch_is_its_members() -> None:
    B, A = normal(3, 9, 4), normal(3, 4, 8, seed=1)
    A[1] = -A[1]
    for route in ROUTES.values():
        together = route(B, A, 2)
        for i in range(3):
            for left, right in zip(together, route(B[i], A[i], 2), strict=True):
                torch.testing.assert_close(left[i], right, rtol=0, atol=1e-9)


def test_svd_each_groups_modules_of_unlike_shapes() -> None:
    shapes = {"a": (9, 4, 8), "b": (9, 4, 8), "c": (3, 5, 8), "d": (9, 2, 8)}
    lora = {n: LoraFactors(normal(r, i, seed=r), normal(o, r, seed=o), 2.0) for n, (o, r, i) in shapes.items()}
    found = svd_each(lora)
    assert list(found) == list(shapes)
    for name, f in lora.items():
        torch.testing.assert_close(rebuilt(found[name]), 2.0 * f.B @ f.A)


def hard_sum(case: str, n: int = 3) -> tuple[Tensor, Tensor]:
    """fp32 factors B [n, 60, 24], A [n, 24, 50] of a sum that is hard to decompose."""
    B, A = normal(n, 60, 24), normal(n, 24, 50, seed=1)
    if case == "ill-conditioned":
        B, A = torch.linalg.qr(B).Q, torch.linalg.qr(A.mT).Q.mT
        B = B * torch.logspace(0, -6, 24, dtype=torch.float64)
        mix = torch.linalg.qr(normal(n, 24, 24, seed=2)).Q
        B, A = B @ mix, mix.mT @ A
    elif case == "rank-deficient":
        B, A = B[..., :8] @ normal(n, 8, 24, seed=2), normal(n, 24, 8, seed=3) @ A[..., :8, :]
    elif case == "duplicated":
        B, A = torch.cat([B[..., :6]] * 4, dim=-1), torch.cat([A[..., :6, :]] * 4, dim=-2)
    elif case == "near-parallel":
        B, A = B + 30 * B[..., :1], A + 30 * A[..., :1, :]
    elif case == "denormal":
        B = B * 1e-40
    elif case == "zero":
        B = B * 0
    return B.float(), A.float()


@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize(
    "case", ["random", "ill-conditioned", "rank-deficient", "duplicated", "near-parallel", "denormal", "zero"]
)
def test_fp32_factors_keep_the_digits_of_fp32(case: str, rank: int) -> None:
    """Beside the fp64 SVD of the dense product. What U and Vh lose is the rounding of fp32, whatever was squared."""
    B, A = hard_sum(case)
    exact = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    u, s, vh = lowrank.product_svd(B, A, rank)
    k = rank or 24
    assert (s.dtype, u.dtype, vh.dtype) == (torch.float64, torch.float32, torch.float32)
    top = exact.S[:, :1]
    assert ((s - exact.S[:, :k]).abs() <= 3e-7 * top).all()
    best = (exact.U[..., :k] * exact.S[:, None, :k]) @ exact.Vh[..., :k, :]
    missed = torch.linalg.matrix_norm((u.double() * s[:, None, :]) @ vh.double() - best)
    assert (missed <= 2e-6 * top[:, 0]).all()
    for i in range(len(s)):
        kept = s[i] > 1e-3 * top[i]
        one = torch.eye(int(kept.sum())).double()
        torch.testing.assert_close(u[i, :, kept].double().T @ u[i, :, kept].double(), one, rtol=0, atol=3e-6)
        torch.testing.assert_close(vh[i, kept].double() @ vh[i, kept].double().T, one, rtol=0, atol=3e-6)


def test_a_function_chooses_how_many_components_each_module_keeps() -> None:
    lora = {
        name: LoraFactors(
            normal(r, 30, seed=r).float(), normal(40, r, seed=r + 1).float() * 0.5 ** torch.arange(r), 1.0
        )
        for name, r in {"a": 6, "b": 6, "c": 9}.items()
    }
    lora["b"] = LoraFactors(lora["b"].A * 0, lora["b"].B, 1.0)
    every = svd_each(lora)
    found = svd_each(lora, lambda s: max(1, int((s > 0.2 * s[0]).sum())))
    for name, (u, s, vh) in found.items():
        known = every[name][1]
        assert len(s) == max(1, int((known > 0.2 * known[0]).sum()))
        assert (u.shape[1], len(vh)) == (len(s), len(s))
        torch.testing.assert_close(s, known[: len(s)])
        torch.testing.assert_close(u, every[name][0][:, : len(s)])
    assert len({len(s) for _, s, _ in found.values()}) > 1


def test_whether_a_matrix_has_full_rank() -> None:
    full = normal(20, 30)
    assert lowrank.surely_full_rank(full)
    assert lowrank.surely_full_rank(full.T)
    assert lowrank.surely_full_rank(1e-20 * full)
    assert not lowrank.surely_full_rank(normal(20, 19) @ normal(19, 30, seed=1))
    assert not lowrank.surely_full_rank(torch.zeros(20, 30))
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    s[-1] = 1e-7 * s.norm()
    assert not lowrank.surely_full_rank((u * s) @ vh)
