"""Riemannian preconditioning: the step of B A does not depend on the factors' sizes."""

from __future__ import annotations

import pytest
import torch

from fedlora.clients.optimizers.registry import optimizer
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig

from .tools import apart, copied, drop, factors, loss_of, modules, play, refactored


def test_a_plain_step_is_the_formula():
    trained, lr, delta = modules(), 0.01, 0.3
    other = copied(trained)
    loss_of(other, 0).backward()
    play(trained, "riemannian", 1, lr=lr, options=f"base=sgd, delta={delta}", clip=0.0)
    for got, pair in zip(trained.pairs, other.pairs, strict=True):
        damping = delta * torch.eye(len(pair.A), dtype=torch.float64)
        a, b = pair.A.detach(), pair.B.detach()
        torch.testing.assert_close(got.A.detach(), a - lr * torch.linalg.inv(b.mT @ b + damping) @ pair.A.grad)
        torch.testing.assert_close(got.B.detach(), b - lr * pair.B.grad @ torch.linalg.inv(a @ a.mT + damping))
    drop(other)


def test_steps_are_invariant_to_refactoring_and_plain_ones_are_not():
    start, options = modules(), "base=sgd, delta=1e-14"
    ours = [play(which(start), "riemannian", options=options, clip=0.0) for which in (copied, refactored)]
    plain = [play(which(start), "sgd", clip=0.0) for which in (copied, refactored)]
    assert apart(*ours) < 1e-10
    assert apart(*plain) > 1e-2


def test_adamws_moments_are_of_the_scaled_gradients():
    """With base=adamw the first step of every value is the rate; from the second on it is not AdamW's own."""
    one, other = modules(), modules()
    apart_after = [apart(play(one, "riemannian", n, lr=1e-3), play(other, "adamw", n, lr=1e-3)) for n in (4,)]
    assert apart_after[0] > 1e-5
    start = factors(fresh := modules())
    play(fresh, "riemannian", 1, lr=1e-3)
    for now, before in zip(factors(fresh), start, strict=True):
        torch.testing.assert_close((now - before).abs(), torch.full_like(now, 1e-3), rtol=1e-3, atol=0)


def test_from_b_of_zeros_the_loss_falls():
    trained = modules(torch.float32, zero=True)
    before = float(loss_of(trained, 0).detach())
    play(trained, "riemannian", 15)
    assert float(loss_of(trained, 0).detach()) < before


@pytest.mark.parametrize("delta", ["0", "-1", "nan"])
def test_a_delta_that_is_none_is_refused(delta):
    with pytest.raises(
        ConfigError, match=r"train.optimizer-options: riemannian's delta = .*, expected a number above 0"
    ):
        optimizer(TrainConfig(optimizer="riemannian", optimizer_options=f"delta={delta}"))
