"""SAM: the gradient of a step is taken at a distance."""

from __future__ import annotations

import pytest
import torch

from fedlora.clients.optimizers.registry import optimizer
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig

from .tools import apart, copied, drop, factors, loss_of, modules, play


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["sam", "glad"])
def test_without_a_radius_it_is_its_base_and_near_it_with_a_small_one(name, base):
    start = modules(torch.float32, head=True)
    plain, none, small, large = (copied(start) for _ in range(4))
    expected = play(plain, base)
    play(none, name, options=f"rho=0, base={base}")
    assert all(torch.equal(x, y) for x, y in zip(factors(none), factors(plain), strict=True))
    near = apart(play(small, name, options=f"rho=1e-5, base={base}"), expected)
    far = apart(play(large, name, options=f"rho=0.5, base={base}"), expected)
    assert near < 1e-3
    assert far > 1e-3 or name == "glad"


def test_a_plain_step_goes_along_the_gradient_at_the_distance_rho():
    trained, lr, rho = modules(head=True), 0.01, 0.3
    other = copied(trained)
    start = factors(other)
    play(trained, "sam", 1, lr=lr, options=f"base=sgd, rho={rho}", clip=0.0)
    loss_of(other, 0).backward()
    grads = [p.grad for p in other.parameters if p.grad is not None]
    size = torch.cat([grad.flatten() for grad in grads]).norm()
    with torch.no_grad():
        for parameter, grad in zip(other.parameters, grads, strict=True):
            parameter.add_(rho * grad / size)
    moved = torch.cat([(p.detach() - before).flatten() for p, before in zip(other.parameters, start, strict=True)])
    assert float(moved.norm()) == pytest.approx(rho)
    drop(other)
    loss_of(other, 0).backward()
    for got, parameter, before in zip(factors(trained), other.parameters, start, strict=True):
        torch.testing.assert_close(got, before - lr * parameter.grad)


@pytest.mark.parametrize("name", ["sam", "glad"])
@pytest.mark.parametrize("rho", ["-0.1", "nan", "inf"])
def test_a_radius_that_is_none_is_refused(name, rho):
    with pytest.raises(
        ConfigError, match=rf"train.optimizer-options: {name}'s rho = .*, expected a number of at least 0"
    ):
        optimizer(TrainConfig(optimizer=name, optimizer_options=f"rho={rho}"))
