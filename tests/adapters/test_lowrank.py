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
