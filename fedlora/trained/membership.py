"""Membership inference: how well losses tell the rows that a model was trained on from other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import bootstrap, rankdata
from torch import nn

from fedlora.data import eval_batches
from fedlora.tasks.checked import check_batch, row_losses

if TYPE_CHECKING:
    from fedlora.data import Example
    from fedlora.tasks.base import Task

FALSE_ALARMS = 0.01  # of which `caught` speaks
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Attack:
    """An attacker who calls the rows with the highest scores members, at every threshold.

    Args:
        members: scores of rows that the model was trained on, [n].
        others: scores of rows that it was not trained on, [m].
    """

    members: np.ndarray
    others: np.ndarray

    @cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The shares of the others and of the members that are called members, for each threshold, both ascending."""
        levels = np.unique(np.concatenate([self.members, self.others]))[::-1]
        below = (np.searchsorted(np.sort(group), levels) / len(group) for group in (self.others, self.members))
        wrong, right = (np.append(0.0, 1 - share) for share in below)
        return wrong, right

    @property
    def auc(self) -> float:
        """The probability that a member has a higher score than another row; 0.5 is guessing."""
        return float(_area(self.members, self.others))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """A bootstrap interval of `auc` at 95 %, over both groups of rows."""
        both = (self.members, self.others)
        found = bootstrap(both, _area, n_resamples=1000, vectorized=True, method="percentile", rng=0)
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    @property
    def caught(self) -> float:
        """The largest share of the members that is found while at most 1 % of the others are called members."""
        wrong, right = self.curve
        return float(right[wrong <= FALSE_ALARMS].max())

    @property
    def advantage(self) -> float:
        """The largest difference between the two shares of `curve`; 0 is guessing, 1 is knowing."""
        wrong, right = self.curve
        return float((right - wrong).max())


def _area(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """The area under the curve along an axis, by Mann and Whitney's ranks, in which equal scores share theirs."""
    count, rest = members.shape[axis], others.shape[axis]
    ranks = np.take(rankdata(np.concatenate([members, others], axis), axis=axis), np.arange(count), axis)
    return (ranks.sum(axis) - count * (count + 1) / 2) / (count * rest)


def losses_of(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """The mean loss of each row, fp64 [rows].

    Args:
        task: the task to which the examples belong.
        model: the model with its adapter.
        examples: the rows, each with something to predict.
        batch_size: rows of a forward pass.
        pad_id: token that fills up shorter rows.
        on_batch: called after each forward pass with its number of rows.
    """
    means, was_training = np.zeros(len(examples)), model.training
    model.eval()
    with torch.no_grad():
        for chosen in eval_batches(examples, batch_size):
            batch = check_batch(task, task.collate([examples[at] for at in chosen], pad_id), len(chosen))
            means[chosen] = row_losses(task, model, batch, len(chosen)).cpu().numpy()
            on_batch(len(chosen))
    model.train(was_training)
    return means


def likelihood_ratios(losses: np.ndarray, of_shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Scores by shadow models, each trained on other rows: log p(loss | member) - log p(loss | no member), [rows].

    Carlini et al. 2022, "Membership Inference Attacks From First Principles", https://arxiv.org/abs/2112.03570,
    Algorithm 1: for each row, one normal distribution of `log(p / (1 - p))`, p = exp(-loss), over the shadows that were
    trained on it and one over the others. With few shadows, as here, both variances are common to all rows, as
    in Section IV-C of the paper.

    Args:
        losses: the losses by the audited model, [rows].
        of_shadows: those by the shadow models, [shadows, rows].
        inside: whether the shadow was trained on the row, [shadows, rows]; each row needs one that was and one that
            was not.
    """
    confidence, shadows = _logit(losses), _logit(of_shadows)
    ratio = np.zeros(len(losses))
    for group, sign in ((inside, 1), (~inside, -1)):
        mean = (shadows * group).sum(axis=0) / group.sum(axis=0)
        free = max(1, group.sum() - group.shape[1])  # each row has spent one degree of freedom on its mean
        variance = max(_TINY, float((((shadows - mean) * group) ** 2).sum() / free))
        ratio += sign * (-((confidence - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance))
    return ratio


def _logit(losses: np.ndarray) -> np.ndarray:
    """`log(p / (1 - p))` for p = exp(-loss)."""
    return -losses - np.log(-np.expm1(-np.maximum(losses, _TINY)))
