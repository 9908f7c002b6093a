"""LoRA+: AdamW with a larger rate for B."""

from __future__ import annotations

import pytest
import torch

from fedlora.clients.optimizers.registry import optimizer
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Pair, Trainable

from .tools import copied, factors, modules, play


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_of_1_is_adamw_to_the_bit(dtype):
    one = modules(dtype, head=True)
    other, start = copied(one), factors(one)
    play(one, "lora-plus", options="ratio=1", decay=0.1)
    play(other, "adamw", decay=0.1)
    for ours, theirs, before in zip(factors(one), factors(other), start, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


def test_b_alone_is_faster_by_the_ratio():
    """Adam's first step of every value is the rate."""
    one = modules(head=True)
    start = factors(one)
    play(one, "lora-plus", 1, lr=1e-3, options="ratio=4", clip=0.0)
    fast = {id(pair.B) for pair in one.pairs}
    for parameter, before in zip(one.parameters, start, strict=True):
        moved = (parameter.detach() - before).abs()
        expected = 4e-3 if id(parameter) in fast else 1e-3
        assert torch.allclose(moved, torch.full_like(moved, expected), rtol=1e-3)


def test_a_b_whose_partner_is_frozen_has_the_plain_rate():
    whole = modules()
    pairs = [Pair(p.module, torch.nn.Parameter(p.A.detach(), requires_grad=False), p.B, p.scaling) for p in whole.pairs]
    half = Trainable(pairs, [pair.B for pair in pairs])
    other = copied(half)
    play(half, "lora-plus", 3)
    plain = Trainable(other.pairs, [pair.B for pair in other.pairs])
    play(plain, "adamw", 3)
    assert all(torch.equal(x, y) for x, y in zip(factors(half), factors(plain), strict=True))


@pytest.mark.parametrize("ratio", ["0", "-2", "inf", "nan"])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(
        ConfigError, match=r"train.optimizer-options: lora-plus's ratio = .*, expected a number above 0"
    ):
        optimizer(TrainConfig(optimizer="lora-plus", optimizer_options=f"ratio={ratio}"))
