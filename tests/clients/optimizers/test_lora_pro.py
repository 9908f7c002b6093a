"""LoRA-Pro: the equivalent gradient is the nearest to the weight's that steps of the factors can have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.clients.optimizers.lora_pro import equivalent_norm, nearest
from fedlora.clients.optimizers.registry import optimizer
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig

from .tools import apart, copied, factors, loss_of, modules, play, refactored, updates

S = 0.7


def problem(rank: int = 3, *, zero: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, B, G and the gradients of A and B."""
    g = torch.Generator().manual_seed(3)
    A, B, G = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((rank, 6), (5, rank), (5, 6)))
    B = B * (not zero)
    return A, B, G, S * B.mT @ G, S * G @ A.mT


def equivalent(A: Tensor, B: Tensor, h_a: Tensor, h_b: Tensor) -> Tensor:
    return S * B @ h_a + S * h_b @ A


def brute_force(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """The least-squares fit of G by s B H_A + s H_B A, over the entries of H_A and H_B."""
    rank, d_in, d_out = len(A), A.shape[1], len(B)
    columns = []
    for index in range(rank * d_in + d_out * rank):
        flat = torch.zeros(rank * d_in + d_out * rank, dtype=torch.float64)
        flat[index] = 1
        h_a, h_b = flat[: rank * d_in].reshape(rank, d_in), flat[rank * d_in :].reshape(d_out, rank)
        columns.append(equivalent(A, B, h_a, h_b).flatten())
    matrix = torch.stack(columns, dim=1)
    return (matrix @ torch.linalg.lstsq(matrix, G.flatten()[:, None], driver="gelsd").solution).reshape(G.shape)


@pytest.mark.parametrize("zero", [False, True], ids=["between", "b-of-zeros"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_equivalent_gradient_is_the_least_squares_one(rank, zero):
    A, B, G, grad_a, grad_b = problem(rank, zero=zero)
    made = equivalent(A, B, *nearest(A, B, grad_a, grad_b, S))
    torch.testing.assert_close(made, brute_force(A, B, G), rtol=0, atol=1e-10)
    assert float((made - G).norm()) > 0.1, "G has a part that no step can follow"
    plain = equivalent(A, B, grad_a, grad_b)
    best = plain * (plain * G).sum() / plain.square().sum()
    if rank > 1:  # with rank 1 and B = 0 there is one direction only
        assert float((made - G).norm()) < float((best - G).norm()) - 1e-3, "the factors' own gradients are farther"


def test_the_equivalent_gradient_does_not_depend_on_x_and_x_keeps_the_factors_own():
    A, B, _, grad_a, grad_b = problem()
    h_a, h_b = nearest(A, B, grad_a, grad_b, S)
    made, near = equivalent(A, B, h_a, h_b), (h_a - grad_a).square().sum() + (h_b - grad_b).square().sum()
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        X = torch.randn(3, 3, generator=g, dtype=torch.float64)
        torch.testing.assert_close(equivalent(A, B, h_a + X @ A, h_b - B @ X), made, rtol=0, atol=1e-10)
        for small in (1e-3, -1e-3):
            one, two = h_a + small * X @ A, h_b - small * B @ X
            assert float((one - grad_a).square().sum() + (two - grad_b).square().sum()) > float(near)


def test_its_norm_is_known_without_the_sum():
    A, B, _, grad_a, grad_b = problem()
    h_a, h_b = nearest(A, B, grad_a, grad_b, S)
    expected = equivalent(A, B, h_a, h_b).norm()
    assert float(equivalent_norm(A, B, h_a, h_b, S)) == pytest.approx(float(expected), rel=1e-12)


def test_clipping_bounds_the_equivalent_gradient():
    """A plain step of rate lr moves s B A by lr times the equivalent gradient, up to lr squared."""
    one, start = modules(), modules()
    lr, clip = 1e-4, 0.01
    moved = play(one, "lora-pro", 1, lr=lr, options="base=sgd", clip=clip)[0]
    gap = torch.stack([(x - y).norm() for x, y in zip(moved, updates(start), strict=True)]).norm()
    assert float(gap.detach()) == pytest.approx(lr * clip, rel=1e-2)


def test_plain_steps_are_invariant_to_refactoring_to_first_order():
    start = modules()
    ours = [play(which(start), "lora-pro", 4, lr=1e-3, options="base=sgd", clip=0.0) for which in (copied, refactored)]
    plain = [play(which(start), "sgd", 4, lr=1e-3, clip=0.0) for which in (copied, refactored)]
    assert apart(*ours) < 1e-4 < apart(*plain)


def test_from_b_of_zeros_the_loss_falls_and_all_stays_finite():
    trained = modules(torch.float32, zero=True)
    before = float(loss_of(trained, 0).detach())
    play(trained, "lora-pro", 15)
    assert float(loss_of(trained, 0).detach()) < before
    assert all(bool(torch.isfinite(p).all()) for p in factors(trained))


def test_another_base_is_named():
    with pytest.raises(ConfigError, match=r"train.optimizer-options: lora-pro's base = 'adam'.*adamw"):
        optimizer(TrainConfig(optimizer="lora-pro", optimizer_options="base=adam"))
