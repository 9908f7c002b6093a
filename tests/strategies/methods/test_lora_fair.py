"""LoRA-FAIR against dense least squares, and its cosine form against autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import AdapterState, relative_error
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.lora_fair import LoraFair, cosine_minimum, solve
from tests.naive import dense as naive
from tests.naive import lora_fair as reference
from tests.naive.clients import SHAPES, dense_deltas, start, train
from tests.naive.drawn import updates_of
from tests.naive.factored import ideal

LAMS = (0.0, 1e-4, 0.01, 1.0)


@st.composite
def rounds(draw: st.DrawFn, least: int = 1, one_rank: bool = False) -> list[naive.Part]:
    """One module's replies, like enough to have a mean; in fp64, so that the method alone is measured."""
    d_out, d_in = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    count, rank = draw(st.integers(least, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = normal(5, d_in), normal(d_out, 5)
    parts = []
    for _ in range(count):
        r = rank if one_rank else draw(st.integers(1, 5))
        scaling = 2.0 if one_rank else draw(st.sampled_from([0.5, 2.0, 4 / r**0.5]))
        parts.append(
            naive.Part(
                A[:r] + 0.3 * normal(r, d_in), B[:, :r] + 0.3 * normal(d_out, r), scaling, draw(st.integers(1, 30))
            )
        )
    return parts


def refined(parts: list[naive.Part], strategy: LoraFair) -> tuple[Tensor, Tensor]:
    """The mean of s_k A_k, and B + dB."""
    got = strategy.aggregate(strategy.init(AdapterState()), updates_of(parts), 1).adapter.lora["m"]
    return got.scaling * got.A, got.B


@settings(max_examples=40, deadline=None)
@given(parts=rounds(), lam=st.sampled_from(LAMS))
def test_equals_dense_least_squares(parts: list[naive.Part], lam: float) -> None:
    mean_a, mean_b = reference.padded_means(parts)
    A, B = refined(parts, LoraFair(lam=lam))
    torch.testing.assert_close(A, mean_a)
    expected = mean_b + reference.correction(parts, lam)
    torch.testing.assert_close(B, expected, rtol=1e-6, atol=1e-6 * (1 + float(expected.norm())))


@settings(max_examples=25, deadline=None)
@given(parts=rounds(), lam=st.sampled_from(LAMS), similarity=st.sampled_from(["frobenius", "cosine"]))
def test_one_client_needs_no_correction(parts: list[naive.Part], lam: float, similarity: str) -> None:
    one = parts[0]
    A, B = refined([one], load("lora-fair", lam=lam, similarity=similarity))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(A, one.scaling * one.A, rtol=1e-14, atol=0)
    torch.testing.assert_close(B, one.B, rtol=1e-12, atol=1e-12)


def test_one_client_is_bitwise_identity_in_fp32() -> None:
    client = ClientInfo(client_id=0, rank=3, alpha=16)
    strategy = LoraFair()
    state = strategy.init(start([client]))
    update = train(strategy.broadcast(state, client, 1), client, seed=1)
    sent = strategy.broadcast(strategy.aggregate(state, [update], 1), client, 2).adapter
    for name, factors in update.adapter.lora.items():
        assert torch.equal(sent.lora[name].A, factors.A)
        assert torch.equal(sent.lora[name].B, factors.B)


@settings(max_examples=25, deadline=None)
@given(parts=rounds(least=2, one_rank=True), lam=st.sampled_from(LAMS))
def test_is_never_farther_from_the_ideal_than_fedavg(parts: list[naive.Part], lam: float) -> None:
    updates = updates_of(parts)
    exact = ideal(updates)
    errors = []
    for strategy in (LoraFair(lam=lam), FedAvg()):
        state = strategy.aggregate(strategy.init(AdapterState()), updates, 1)
        errors.append(relative_error(strategy.global_adapter(state).lora, exact))
    assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-12


@settings(max_examples=25, deadline=None)
@given(parts=rounds(least=2))
def test_without_lam_the_residual_is_orthogonal_to_the_rows_of_the_mean(parts: list[naive.Part]) -> None:
    A, B = refined(parts, LoraFair(lam=0.0))
    exact = naive.ideal(parts)
    residual = exact - naive.product(B, A, 1.0)
    scale = float(exact.norm() * A.norm()) + 1e-12
    assert float((residual @ A.T).norm()) <= 1e-8 * scale


def test_a_small_lam_approaches_no_lam() -> None:
    torch.manual_seed(0)
    parts = [naive.Part(torch.randn(3, 7).double(), torch.randn(6, 3).double(), 2.0, n) for n in (1, 5, 2)]
    limit = refined(parts, LoraFair(lam=0.0))[1]
    gaps = [float((refined(parts, LoraFair(lam=lam))[1] - limit).norm()) for lam in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] > 0


@settings(max_examples=30, deadline=None)
@given(parts=rounds(least=2), lam=st.sampled_from([1e-4, 0.01, 1.0]))
def test_cosine_ends_where_the_gradient_of_the_dense_objective_is_zero(parts: list[naive.Part], lam: float) -> None:
    mean_a, mean_b = reference.padded_means(parts)
    exact = naive.ideal(parts)
    # With more rows than inputs the objective is all but flat along some of X, and the search ends before its minimum
    assume(mean_a.shape[0] <= mean_a.shape[1])

    def objective(x: Tensor) -> Tensor:
        model = x @ mean_a
        return 1 - (model * exact).sum() / (model.norm() * exact.norm()) + lam * (x - mean_b).square().sum()

    x = refined(parts, LoraFair(similarity="cosine", lam=lam))[1].clone().requires_grad_()
    value = objective(x)
    value.backward()
    assert float(value.detach()) <= float(objective(mean_b)) + 1e-12
    if float((x.detach() * mean_b).sum()) > 0:  # else no minimum exists: the scale of X has none but 0
        assert x.grad is not None
        assert float(x.grad.norm()) < 1e-7


def test_cosine_differs_from_frobenius_and_raises_the_cosine() -> None:
    torch.manual_seed(1)
    parts = [naive.Part(torch.randn(3, 7).double(), torch.randn(6, 3).double(), 2.0, n) for n in (1, 5, 2)]
    exact = naive.ideal(parts)
    mean_a, mean_b = reference.padded_means(parts)
    by_cosine = refined(parts, LoraFair(similarity="cosine"))[1]
    assert not torch.allclose(by_cosine, refined(parts, LoraFair())[1], rtol=1e-3, atol=1e-3)

    def cosine(b: Tensor) -> float:
        model = b @ mean_a
        return float((model * exact).sum() / model.norm() / exact.norm())

    assert cosine(by_cosine) > cosine(mean_b) + 0.01


def test_cosine_leaves_b_where_it_is_undefined() -> None:
    zero, one, gram = torch.zeros(3, 2).double(), torch.ones(3, 2).double(), torch.eye(2).double()
    assert torch.equal(cosine_minimum(zero, gram, one, 1.0, 0.01), zero)
    assert torch.equal(cosine_minimum(one, gram, zero, 0.0, 0.01), one)


def test_cosine_stays_finite_where_no_minimum_exists() -> None:
    """The best direction points away from B: X would shrink for ever."""
    gram = torch.eye(2).double()
    mean_b = torch.tensor([[1.0, 0.1]]).double()
    got = cosine_minimum(mean_b, gram, -mean_b, float(mean_b.norm()), 1e-4)
    assert got.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(2, 6), known=st.integers(1, 6), seed=st.integers(0, 999))
def test_solve_with_a_singular_matrix_is_the_pseudo_inverse(rank: int, known: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, min(known, rank), generator=generator, dtype=torch.float64)
    right = torch.randn(4, rank, generator=generator, dtype=torch.float64)
    gram = rows @ rows.T
    torch.testing.assert_close(
        solve(right, gram, 0.0), right @ torch.linalg.pinv(gram, rtol=1e-12), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(solve(right, torch.zeros_like(gram), 0.0), torch.zeros_like(right))


def test_dependent_rows_give_the_smallest_correction() -> None:
    """Two equal rows of A, lam = 0: the linear system is singular."""
    torch.manual_seed(2)
    parts = []
    for n in (1, 3):
        row = torch.randn(1, 5).double()
        parts.append(naive.Part(torch.cat([row, row]), torch.randn(4, 2).double(), 1.0, n))
    B = refined(parts, LoraFair(lam=0.0))[1]
    expected = reference.padded_means(parts)[1] + reference.correction(parts, 0.0)
    torch.testing.assert_close(B, expected, rtol=1e-8, atol=1e-8)


def test_fault_2_the_receivers_own_scale_is_divided_out_once() -> None:
    """alpha = 16: scales 4, 8, 16. Every client's start is the same update, cut to its rank."""
    clients = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=i + 1) for i, r in enumerate((4, 2, 1))]
    strategy = LoraFair()
    state = strategy.init(start(clients))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, c, 1), c, seed=1) for c in clients], 1)
    whole = strategy.global_adapter(state).lora
    for c in clients:
        for name, f in strategy.broadcast(state, c, 2).adapter.lora.items():
            assert f.scaling == 16 / c.rank
            expected = naive.product(whole[name].B[:, : c.rank], whole[name].A[: c.rank], 1.0)
            torch.testing.assert_close(naive.product(f.B, f.A, f.scaling), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_no_sampled_client_has_stay_alive() -> None:
    """With the largest client absent, its rows of A are kept with B = 0: both zero would never train again."""
    clients = [ClientInfo(client_id=i, rank=r, alpha=16) for i, r in enumerate((4, 2, 1))]
    strategy = LoraFair()
    begun = start(clients)
    state = strategy.init(begun)
    updates = [train(strategy.broadcast(state, c, 1), c, seed=1) for c in clients[1:]]
    new = strategy.aggregate(state, updates, 1)
    alone = strategy.aggregate(strategy.init(AdapterState()), updates, 1)
    for name in SHAPES:
        sent = strategy.broadcast(new, clients[0], 2).adapter.lora[name]
        assert sent.rank == 4
        assert torch.equal(sent.A[2:], begun.lora[name].A[2:])
        assert not sent.B[:, 2:].any()
    got, expected = dense_deltas(strategy.global_adapter(new)), dense_deltas(strategy.global_adapter(alone))
    for name, matrix in expected.items():
        torch.testing.assert_close(got[name], matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lam", [-0.1, float("nan"), float("inf")])
def test_a_wrong_lam_is_refused(lam: float) -> None:
    with pytest.raises(StrategyError, match="lam = "):
        load("lora-fair", lam=lam)


def test_a_client_of_a_larger_rank_than_the_run_is_refused() -> None:
    client = ClientInfo(client_id=0, rank=2)
    strategy = LoraFair()
    with pytest.raises(StrategyError, match="client 0 has rank 3, the server holds rank 2"):
        strategy.broadcast(strategy.init(start([client])), replace(client, rank=3), 1)
