"""LoRA-RITE: the trajectory of B A does not depend on how it is divided into factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.clients.optimizers.pairs import gradients
from fedlora.clients.optimizers.registry import optimizer
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .tools import apart, copied, drop, factors, loss_of, modules, play, refactored, updates


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_its_trajectory_is_invariant_to_refactoring_and_adams_is_not(decay):
    start = modules()
    ours = [play(which(start), "lora-rite", decay=decay) for which in (copied, refactored)]
    adams = [play(which(start), "adamw", decay=decay) for which in (copied, refactored)]
    assert apart(*ours) < 1e-10
    assert apart(*adams) > 1e-2
    assert apart([updates(start)], ours[0][-1:]) > 1e-2, "it moved"


def test_from_b_of_zeros_a_stands_still_and_b_moves():
    trained = modules(torch.float32, zero=True)
    before = copied(trained)
    play(trained, "lora-rite", 1)
    for pair, start in zip(trained.pairs, before.pairs, strict=True):
        assert torch.equal(pair.A, start.A)
        assert float(pair.B.detach().norm()) > 1e-3
    play(trained, "lora-rite", 2)
    assert all(not torch.equal(pair.A, start.A) for pair, start in zip(trained.pairs, before.pairs, strict=True))


def test_the_first_step_moves_every_direction_of_b_equally():
    """B's first step is lr sqrt(d_out) Q R_A^-T with an orthonormal Q: after it, B' ... has equal singular values."""
    trained = modules(zero=True)
    play(trained, "lora-rite", 1, lr=0.01)
    for pair in trained.pairs:
        _, triangle = torch.linalg.qr(pair.A.detach().mT)
        sizes = torch.linalg.svdvals(pair.B.detach() @ triangle.mT)
        torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01 * len(pair.B) ** 0.5), rtol=1e-2, atol=0)


def test_it_is_the_formula_with_symmetric_roots_in_the_place_of_qr():
    """A naive twin: the basis B (B'B)^(-1/2), which is another one of the same space, gives the same products."""
    one = modules()
    other = copied(one)
    got = play(one, "lora-rite", 6, options="eps=1e-14", clip=0.05)
    expected = naive(other, steps=6, lr=0.02, clip=0.05)
    assert apart(got, expected) < 1e-9


def test_dependent_columns_and_ranks_above_a_side_are_served():
    trained = modules(torch.float32)
    with torch.no_grad():
        trained.pairs[0].B[:, 1] = trained.pairs[0].B[:, 0]
        trained.pairs[1].A[0] = 0
    before = float(loss_of(trained, 0).detach())
    play(trained, "lora-rite", 12)
    assert float(loss_of(trained, 0).detach()) < before
    assert all(bool(torch.isfinite(p).all()) for p in factors(trained))
    wide = wider_than_its_module()
    play(wide, "lora-rite", 6)
    assert all(bool(torch.isfinite(p).all()) for p in factors(wide))


def test_clipping_bounds_the_common_norm_of_its_own_gradients():
    """A joint factor on all of them leaves the first step as it is: it is divided by their size."""
    one, two = modules(), modules()
    assert apart(play(one, "lora-rite", 1, clip=1e-2), play(two, "lora-rite", 1, clip=0.0)) < 1e-3
    assert apart(play(one, "lora-rite", 4, clip=1e-3), play(two, "lora-rite", 4, clip=0.0)) > 1e-3


def test_other_parameters_take_adamws_steps():
    one = modules(head=True)
    alone = Trainable([], [torch.nn.Parameter(one.others[0].detach().clone())])
    play(one, "lora-rite", 3)
    play(alone, "adamw", 3)
    assert torch.equal(one.others[0], alone.parameters[0])


@pytest.mark.parametrize("option", ["beta1=1", "beta2=-0.1", "eps=0"])
def test_options_out_of_range_are_named(option):
    name = option.partition("=")[0]
    with pytest.raises(ConfigError, match=f"train.optimizer-options: lora-rite's {name} = .*, expected a number"):
        optimizer(TrainConfig(optimizer="lora-rite", optimizer_options=option))


def wider_than_its_module() -> Trainable:
    """Pairs whose rank is above d_out."""
    trained = modules(torch.float32)
    for pair in trained.pairs:
        pair.B.data = pair.B.data[:2]
    return trained


def naive(trained: Trainable, steps: int, lr: float, clip: float) -> list[list[Tensor]]:
    """The algorithm as in the paper, one factor after another, with polar instead of QR bases."""

    def root(symmetric: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(symmetric)
        return vectors @ torch.diag(values**power) @ vectors.mT

    state: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
    seen = []
    for step in range(1, steps + 1):
        drop(trained)
        loss_of(trained, step - 1).backward()
        b1, b2 = (b * (1 - b ** (step - 1)) / (1 - b**step) for b in (0.9, 0.999))
        bars, backs, bases = {}, {}, {}
        for pair in trained.pairs:
            grad_a, grad_b = gradients(pair)
            for key, grad, partner in (("A", grad_a.mT, pair.B.detach()), ("B", grad_b, pair.A.detach().mT)):
                backs[pair.module, key] = root(partner.mT @ partner, -0.5)
                bases[pair.module, key] = partner @ backs[pair.module, key]
                bars[pair.module, key] = grad @ backs[pair.module, key]
        size = float(sum(bar.square().sum() for bar in bars.values())) ** 0.5
        with torch.no_grad():
            for pair in trained.pairs:
                for key in ("A", "B"):
                    place = (pair.module, key)
                    bar = bars[place] * min(1.0, clip / size)
                    if place in state:
                        m, v, old = state[place]
                        turn = bases[place].mT @ old
                        m, v = m @ turn.mT, turn @ v @ turn.mT
                    else:
                        m, v = torch.zeros_like(bar), torch.zeros(bar.shape[1], bar.shape[1], dtype=bar.dtype)
                    v = b2 * v + (1 - b2) * bar.mT @ bar / len(bar)
                    m = b1 * m + (1 - b1) * bar @ root(v, -0.5)
                    state[place] = m, v, bases[place]
                    change = lr * m @ backs[place].mT
                    if key == "A":
                        pair.A.sub_(change.mT)
                    else:
                        pair.B.sub_(change)
        drop(trained)
        seen.append([product.detach().clone() for product in updates(trained)])
    return seen
