"""Metrics of predictions, over all or some examples: loss, accuracy, macro F1, exact match, calibration error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import DataError

if TYPE_CHECKING:
    from .base import Task

# The names of the metrics that `common` returns.
COMMON = frozenset({"loss", "accuracy", "calibration-error"})

# Bins of confidence, as in Guo et al. 2017, section 5.
_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """A model's predictions at n positions: all positions of some examples that have a target.

    Attributes:
        rows: number of each position's example, in the order in which the examples were given; int64 [n].
        targets: the true token or class at each position, int64 [n].
        predicted: the most probable token or class, int64 [n]; of a causal model, after the true prefix.
        probabilities: the probability of `predicted`, fp32 [n].
        losses: minus the logarithm of the target's probability, in nats, fp32 [n].
        more: further tensors [n, …] by name, for a task's own metrics.
    """

    rows: Tensor
    targets: Tensor
    predicted: Tensor
    probabilities: Tensor
    losses: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Tensor, rows: Tensor) -> Predictions:
        """The predictions from logits: the most probable class, its probability, and the target's loss.

        Args:
            logits: logits of any float type, `[n, classes]`.
            targets: true class of each position, int64 `[n]`.
            rows: number of each position's example, int64 `[n]`.
        """
        wide = logits.float()
        losses = F.cross_entropy(wide, targets, reduction="none")
        top, predicted = wide.max(dim=-1)
        # log p(predicted) = log p(target) + the difference of their logits, which saves a second sum over all classes
        own = wide.gather(-1, targets[:, None])[:, 0]
        return cls(rows, targets, predicted, (top - own - losses).exp().clamp(max=1.0), losses)

    def columns(self) -> dict[str, Tensor]:
        """All tensors by name, those of `more` included."""
        own = {name: getattr(self, name) for name in _COLUMNS}
        return own | {f"more.{name}": column for name, column in self.more.items()}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> Predictions:
        """The predictions with these `columns`."""
        more = {name.removeprefix("more."): column for name, column in columns.items() if name not in _COLUMNS}
        return cls(**{name: columns[name] for name in _COLUMNS}, more=more)

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several predictions as one, moved to the CPU."""
        columns = [part.columns() for part in parts]
        return cls.from_columns({name: torch.cat([each[name] for each in columns]).cpu() for name in columns[0]})

    def split(self, counts: Sequence[int]) -> list[Predictions]:
        """The predictions in parts: the first counts[0] positions, the next counts[1], and so on."""
        parts = {name: column.split(list(counts)) for name, column in self.columns().items()}
        return [self.from_columns({name: part[i] for name, part in parts.items()}) for i in range(len(counts))]

    def of(self, rows: Tensor) -> Predictions:
        """The predictions for the examples with these numbers."""
        chosen = torch.isin(self.rows, rows)
        return self.from_columns({name: column[chosen] for name, column in self.columns().items()})

    def at(self, rows: Tensor) -> Predictions:
        """The same predictions with other numbers of examples: number i becomes `rows[i]`."""
        return replace(self, rows=rows[self.rows])


_COLUMNS = ("rows", "targets", "predicted", "probabilities", "losses")


def scores(task: Task, predictions: Predictions, rows: Tensor | None = None) -> dict[str, float]:
    """A task's metrics over all examples, or over some.

    Args:
        task: the task to which the predictions belong.
        predictions: the predictions for any examples.
        rows: numbers of the examples that count, int64; all examples when left out.

    Raises:
        DataError: these examples have no labelled position.
    """
    from .checked import check_scores

    chosen = predictions if rows is None else predictions.of(rows)
    if not len(chosen.targets):
        raise DataError("there is no labelled token to evaluate on; raise data.max-length or give more held-out rows")
    return check_scores(task, task.scores(chosen))


def common(predictions: Predictions) -> dict[str, float]:
    """`loss` (nats), `accuracy` (of the next token, or of the class) and `calibration-error`, over all positions."""
    correct = predictions.predicted == predictions.targets
    return {
        "loss": float(predictions.losses.double().mean()),
        "accuracy": float(correct.double().mean()),
        "calibration-error": calibration_error(predictions.probabilities, correct),
    }


def calibration_error(probabilities: Tensor, correct: Tensor) -> float:
    """Expected calibration error: `sum_m |B_m| / n * |accuracy(B_m) - confidence(B_m)|` over 15 equal bins.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, eq. 3. Bin m holds
    the positions whose confidence lies in ((m - 1) / 15, m / 15].

    Args:
        probabilities: the probability of each prediction, [n].
        correct: whether each prediction is right, bool [n].
    """
    edges = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(probabilities.double(), edges)
    gaps = torch.bincount(bins, correct.double() - probabilities.double(), minlength=_BINS)
    return float(gaps.abs().sum() / len(bins))


def exact_match(rows: Tensor, correct: Tensor) -> float:
    """The share of examples all of whose positions are correct.

    Args:
        rows: number of each position's example, int64 [n].
        correct: whether the prediction at each position is right, bool [n].
    """
    examples, position = rows.unique(return_inverse=True)
    missed = torch.bincount(position, ~correct, minlength=len(examples))
    return float((missed == 0).double().mean())


def macro_f1(predicted: Tensor, targets: Tensor) -> float:
    """The mean of `F1 = 2 |hits| / (|predicted| + |true|)` over the classes that occur in either argument.

    Args:
        predicted: number of the predicted class, int64 [n].
        targets: number of the true class, int64 [n].
    """
    classes = int(torch.maximum(predicted.max(), targets.max())) + 1
    hits = torch.bincount(targets[predicted == targets], minlength=classes).double()
    named = torch.bincount(predicted, minlength=classes) + torch.bincount(targets, minlength=classes)
    return float((2 * hits[named > 0] / named[named > 0]).mean())
