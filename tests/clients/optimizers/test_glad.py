"""GLAD: the step never points against the gradient nearby."""

from __future__ import annotations

import torch

from fedlora.clients.optimizers.registry import optimizer
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .tools import modules

OPTIONS = TrainConfig(optimizer="glad", optimizer_options="base=sgd", lr=1.0, clip=0.0)


def step_of(first: list[torch.Tensor], second: list[torch.Tensor], trained: Trainable) -> list[torch.Tensor]:
    """The direction in which a plain step goes with these two gradients."""
    before = [p.detach().clone() for p in trained.parameters]
    taken = optimizer(OPTIONS).begin(trained, OPTIONS)
    for parameter, grad in zip(trained.parameters, first, strict=True):
        parameter.grad = grad.clone()
    taken.after_pass(0)
    for parameter, grad in zip(trained.parameters, second, strict=True):
        parameter.grad = grad.clone()
    taken.step(1.0)
    return [start - p.detach() for p, start in zip(trained.parameters, before, strict=True)]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_it_is_the_plain_gradient_or_its_part_across_the_other_one():
    g = torch.Generator().manual_seed(0)
    against = 0
    for _ in range(20):
        trained = modules(head=True)
        first, second = ([torch.randn(p.shape, generator=g, dtype=p.dtype) for p in trained.parameters] for _ in "ab")
        one, sharp, got = flat(first), flat(second), flat(step_of(first, second, trained))
        assert float(got @ sharp) >= -1e-10
        if float(one @ sharp) >= 0:
            torch.testing.assert_close(got, one)
            continue
        against += 1
        torch.testing.assert_close(got, one - (one @ sharp) * sharp / (sharp @ sharp))
        assert abs(float(got @ sharp)) < 1e-10
    assert 0 < against < 20


def test_gradients_of_zeros_move_nothing():
    trained = modules(head=True)
    zeros = [torch.zeros_like(p) for p in trained.parameters]
    assert float(flat(step_of(zeros, zeros, trained)).norm()) == 0
