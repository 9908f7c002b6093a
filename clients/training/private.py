"""DP-SGD on the client: rows drawn at random, their gradients clipped one by one, and noise on the sum in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora.common.errors import ConfigError
from fedlora.common.noise import Noise
from fedlora.config import Config, TrainConfig
from fedlora.data import Example
from fedlora.exchange.privacy import mechanism, sampling_rate
from fedlora.models.trainable import Trainable

from ..optimizers.registry import optimizer


@dataclass(frozen=True)
class RowPrivacy:
    """How one client's steps protect its rows.

    Abadi et al. 2016, "Deep Learning with Differential Privacy", https://arxiv.org/abs/1607.00133, Algorithm 1: each
    row is in a step with the probability `rate`, independently; its gradient is that of the mean loss of its own
    tokens, times `min(1, clip / norm)` with the norm over all that is trained; and the step's gradient is
    `(sum + N(0, (noise_multiplier clip)^2)) / expected`. The denominator is fixed, whatever rows were drawn.

    Args:
        clip: largest norm of a row's gradient.
        noise_multiplier: standard deviation of the noise over `clip`; 0: none, for tests alone.
        rate: probability with which a row is in a step.
        expected: expected number of rows in a step, the denominator.
        noise: where random numbers come from; the operating system's entropy unless a test says otherwise.
    """

    clip: float
    noise_multiplier: float
    rate: float
    expected: float
    noise: Noise = field(default_factory=Noise)

    @classmethod
    def of(cls, config: Config, num_examples: int) -> RowPrivacy | None:
        """That of a run's config for a client with so many rows; None without `privacy.level = example`.

        Raises:
            ConfigError: the accountant's library is not installed, no noise gives the run's epsilon, or the optimizer
                would see the rows more than once in a step.
        """
        if config.privacy.level != "example":
            return None
        check_optimizer(config.train)
        made = mechanism(config, num_examples)
        assert made is not None
        rate = sampling_rate(config, num_examples)
        return cls(config.privacy.clip, made.noise_multiplier, rate, rate * num_examples)

    def drawn(self, examples: Sequence[Example], most: int) -> list[list[Example]]:
        """The rows of one step, in as few parts of at most `most` rows as there can be; none if no row was drawn."""
        chosen = self.noise.chosen(len(examples), self.rate)
        count = math.ceil(len(chosen) / most)
        size = math.ceil(len(chosen) / count) if count else 0
        return [[examples[i] for i in chosen[at : at + size]] for at in range(0, len(chosen), size or 1)]


class ClippedSum:
    """The sum of one step's clipped gradients, for each trained parameter.

    Attributes:
        clipped: number of rows of all steps so far whose gradient was scaled down.
        rows: number of rows of all steps so far.
    """

    def __init__(self, privacy: RowPrivacy, trained: Trainable, heads: Sequence[str]) -> None:
        """Begin with nothing.

        Args:
            privacy: the clip and the noise.
            trained: what the client trains.
            heads: names of the tensors trained in full, in the order in which `trained` has them.
        """
        self._privacy = privacy
        self._parameters: dict[str, nn.Parameter] = {}
        for pair in trained.pairs:
            for which, factor in (("A", pair.A), ("B", pair.B), ("R", pair.core)):
                if factor is not None and factor.requires_grad:
                    self._parameters[f"{pair.module}.{which}"] = factor
        known = {id(parameter) for parameter in self._parameters.values()}
        others = [parameter for parameter in trained.parameters if id(parameter) not in known]
        self._parameters |= zip(heads if others else (), others, strict=True)
        self._sums: dict[str, Tensor] = {}
        self.clipped = self.rows = 0

    def add(self, found: Mapping[str, Tensor], first: int, count: int) -> None:
        """Add the rows from `first` on, each clipped; rows whose gradient is not finite count as zero.

        Args:
            found: name -> gradients of the rows [rows, …], with ranks up to the largest of a batch of clients.
            first, count: which rows are this client's; there may be none.
        """
        mine = {
            name: _cut(found[name][first : first + count], parameter)
            for name, parameter in self._parameters.items()
            if name in found
        }
        if not count or not mine:
            return
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in mine.values()]).sum(0)
        norms = squares.sqrt()
        factors = (self._privacy.clip / norms.clamp(min=1e-300)).clamp(max=1.0)
        self.rows += count
        self.clipped += int((factors < 1).sum())
        finite = torch.isfinite(norms)
        for name, gradient in mine.items():
            own = gradient if bool(finite.all()) else torch.where(_like(finite, gradient), gradient, 0.0)
            own = torch.tensordot(torch.where(finite, factors, 0.0).to(own), own, dims=1)
            self._sums[name] = self._sums[name] + own if name in self._sums else own

    def finish(self) -> None:
        """Set each parameter's gradient to the noised mean, and begin the next sum."""
        privacy = self._privacy
        deviation = privacy.noise_multiplier * privacy.clip
        for name, parameter in self._parameters.items():
            total = self._sums.get(name)
            total = torch.zeros_like(parameter) if total is None else total
            if deviation:
                drawn = torch.from_numpy(privacy.noise.normal(tuple(parameter.shape), deviation))
                total = total + drawn.to(total)
            # as the parameter lies in memory, where it may be a view: fused optimizers go through both side by side
            parameter.grad = torch.empty_like(parameter).copy_(total / privacy.expected)
        self._sums.clear()


def check_optimizer(config: TrainConfig) -> None:
    """Raises ConfigError if the optimizer takes more than one gradient of the same rows in a step."""
    passes = optimizer(config).passes
    if passes > 1:
        raise ConfigError(
            f"train.optimizer = {config.optimizer} takes {passes} gradients of the same rows in each step, and "
            "privacy.level = example counts one; set train.optimizer = adamw or sgd"
        )


def _cut(gradients: Tensor, parameter: nn.Parameter) -> Tensor:
    """The rows' gradients at the parameter's own rank: a client's factors are the first rows of the batch's."""
    for axis, size in enumerate(parameter.shape, start=1):
        gradients = gradients.narrow(axis, 0, size)
    return gradients


def _like(rows: Tensor, gradient: Tensor) -> Tensor:
    """[rows] for a comparison with [rows, …]."""
    return rows.reshape(-1, *[1] * (gradient.ndim - 1))
