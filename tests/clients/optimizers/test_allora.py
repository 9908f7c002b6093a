"""ALLoRA: small rows learn faster."""

from __future__ import annotations

import pytest
import torch

from fedlora.clients.optimizers import registry
from fedlora.clients.optimizers.allora import row_factors
from fedlora.common.errors import ConfigError
from fedlora.common.once import say_once
from fedlora.config import TrainConfig

from .tools import apart, copied, factors, modules, play


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_the_factor_is_eta_at_a_row_of_zeros_and_falls_with_its_norm(eta):
    rows = torch.outer(torch.tensor([0.0, 0.1, 1.0, 10.0, 1e4]), torch.tensor([0.6, 0.8]))
    found = row_factors(rows, eta)
    assert found.shape == (5, 1)
    assert float(found[0]) == pytest.approx(eta)
    assert bool((found[1:] < found[:-1]).all())
    assert float(found[2]) == pytest.approx((1 + 1 / eta**2) ** -0.5)


def test_as_a_rate_it_multiplies_adamws_step_of_each_row():
    one = modules(head=True)
    other, start = copied(one), factors(one)
    play(one, "allora", 1, options="scale=step, eta=3")
    play(other, "adamw", 1)
    for got, plain, before in zip(factors(one), factors(other), start, strict=True):
        factor = row_factors(before, 3.0) if before.ndim == 2 else 1.0
        torch.testing.assert_close(got - before, factor * (plain - before))


def test_as_a_factor_of_gradients_only_its_change_is_left_after_adamw():
    """The first step is AdamW's own, up to its eps; later ones are not, since the rows have other sizes by then."""
    start = modules()
    one, other = (play(copied(start), name, 1, clip=0.0) for name in ("allora", "adamw"))
    assert apart(one, other) < 1e-6
    one, other = (play(copied(start), name, 6, lr=0.1, clip=0.0) for name in ("allora", "adamw"))
    assert apart(one, other) > 1e-4


def test_that_its_form_is_not_confirmed_is_logged_once(caplog):
    say_once.cache_clear()
    for _ in range(2):
        registry.optimizer(TrainConfig(optimizer="allora"))
        registry.optimizer(TrainConfig(optimizer="adamw"))
    assert [r.message for r in caplog.records if "experimental" in r.message] == [
        f"train.optimizer = allora is experimental: {registry.OPTIMIZERS.load('allora').experimental}"
    ]


@pytest.mark.parametrize(("option", "says"), [("eta=0", "eta = 0, expected"), ("scale=row", "scale = 'row'")])
def test_options_out_of_range_are_named(option, says):
    with pytest.raises(ConfigError, match=f"train.optimizer-options: allora's {says}"):
        registry.optimizer(TrainConfig(optimizer="allora", optimizer_options=option))
