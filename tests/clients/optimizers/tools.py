"""Small problems for client optimizers: a few modules, and a loss of their products B A alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlora.clients.optimizers.registry import optimizer
from fedlora.config import TrainConfig
from fedlora.models.trainable import Pair, Trainable

SHAPES = ((6, 5, 2), (4, 7, 3), (6, 5, 2))  # d_out, d_in, rank; two are alike


def modules(dtype: torch.dtype = torch.float64, *, zero: bool = False, seed: int = 0, head: bool = False) -> Trainable:
    """Random pairs of factors with unequal scalings; with `zero`, B = 0; with `head`, a vector trained in full."""
    g = torch.Generator().manual_seed(seed)
    pairs = [
        Pair(
            f"m{number}",
            nn.Parameter(torch.randn(rank, d_in, generator=g, dtype=torch.float64).to(dtype)),
            nn.Parameter((torch.randn(d_out, rank, generator=g, dtype=torch.float64) * (not zero)).to(dtype)),
            scaling=0.5 + number,
        )
        for number, (d_out, d_in, rank) in enumerate(SHAPES)
    ]
    more = [nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64).to(dtype))] if head else []
    return Trainable(pairs, [p for pair in pairs for p in (pair.A, pair.B)] + more)


def refactored(trained: Trainable, seed: int = 5) -> Trainable:
    """The same products from other factors: S A and B S^-1."""
    g = torch.Generator().manual_seed(seed)
    pairs = []
    for pair in trained.pairs:
        rank = len(pair.A)
        turn = torch.randn(rank, rank, generator=g, dtype=torch.float64) + 3 * torch.eye(rank, dtype=torch.float64)
        a, b = turn @ pair.A.detach(), pair.B.detach() @ torch.linalg.inv(turn)
        pairs.append(Pair(pair.module, nn.Parameter(a), nn.Parameter(b), pair.scaling))
    return Trainable(pairs, [p for pair in pairs for p in (pair.A, pair.B)])


def copied(trained: Trainable) -> Trainable:
    pairs = [
        Pair(p.module, nn.Parameter(p.A.detach().clone()), nn.Parameter(p.B.detach().clone()), p.scaling)
        for p in trained.pairs
    ]
    more = [nn.Parameter(p.detach().clone()) for p in trained.others]
    return Trainable(pairs, [p for pair in pairs for p in (pair.A, pair.B)] + more)


def updates(trained: Trainable) -> list[Tensor]:
    """s B A of each module."""
    return [pair.scaling * pair.B @ pair.A for pair in trained.pairs]


def loss_of(trained: Trainable, step: int) -> Tensor:
    """A loss of the products, with another target in every step, like batches; and of the head."""
    g = torch.Generator().manual_seed(100 + step)
    total = torch.zeros((), dtype=torch.float64)
    for product in updates(trained):
        target = torch.randn(product.shape, generator=g, dtype=torch.float64)
        total = total + (product.double() - target).square().mean() + 0.1 * product.double().pow(4).mean()
    return total + sum((head.double() - 1).square().mean() for head in trained.others)


def play(
    trained: Trainable,
    name: str,
    steps: int = 8,
    *,
    lr: float = 0.02,
    options: str = "",
    decay: float = 0.0,
    clip: float = 1.0,
) -> list[list[Tensor]]:
    """Train in place; the products after each step."""
    config = TrainConfig(optimizer=name, optimizer_options=options, lr=lr, weight_decay=decay, clip=clip)
    method = optimizer(config)
    taken, seen = method.begin(trained, config), []
    for step in range(steps):
        for number in range(method.passes):
            if number:
                taken.after_pass(number - 1)
            drop(trained)
            loss_of(trained, step).backward()
        taken.step(lr)
        drop(trained)
        seen.append([product.detach().clone() for product in updates(trained)])
    return seen


def drop(trained: Trainable) -> None:
    for parameter in trained.parameters:
        parameter.grad = None


def apart(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """The largest distance of two trajectories, as a share of a product's size."""
    return max(
        float((x - y).detach().norm() / x.detach().norm())
        for left, right in zip(one, other, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def factors(trained: Trainable) -> list[Tensor]:
    return [p.detach().clone() for p in trained.parameters]
