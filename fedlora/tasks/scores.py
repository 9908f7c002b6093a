"""Metrics of predictions: loss, accuracy, macro F1, exact match, calibration error; over all examples or some."""

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

# The names that `common` gives.
COMMON = frozenset({"loss", "accuracy", "calibration-error"})

# Bins of confidence, as in Guo et al. 2017, section 5.
_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a model said wherever there was something to predict: n positions.

    Attributes:
        rows: int64 [n], the position's example, counted as the examples were given.
        targets: [n], what is true: a token or a class (int64).
        predicted: [n], of the same kind: the most probable one; for a causal model after the true prefix.
        probabilities: fp32 [n], of `predicted`.
        losses: fp32 [n], minus the logarithm of the target's probability (nats).
        more: what a task's own metrics need besides, each [n, …], by name.
    """

    rows: Tensor
    targets: Tensor
    predicted: Tensor
    probabilities: Tensor
    losses: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Tensor, rows: Tensor) -> Predictions:
        """The most probable class of each position, its probability, and the target's loss.

        Args:
            logits: `[n, classes]`, of any float type.
            targets: int64 `[n]`.
            rows: int64 `[n]`.
        """
        wide = logits.float()
        losses = F.cross_entropy(wide, targets, reduction="none")
        top, predicted = wide.max(dim=-1)
        # log p(predicted) = log p(target) + the difference of their logits: no second sum over the vocabulary
        own = wide.gather(-1, targets[:, None])[:, 0]
        return cls(rows, targets, predicted, (top - own - losses).exp().clamp(max=1.0), losses)

    def columns(self) -> dict[str, Tensor]:
        """All tensors by name, those of `more` included."""
        own = {name: getattr(self, name) for name in _COLUMNS}
        return own | {f"more.{name}": column for name, column in self.more.items()}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> Predictions:
        """Back from `columns`."""
        more = {name.removeprefix("more."): column for name, column in columns.items() if name not in _COLUMNS}
        return cls(**{name: columns[name] for name in _COLUMNS}, more=more)

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several as one, on the CPU."""
        columns = [part.columns() for part in parts]
        return cls.from_columns({name: torch.cat([each[name] for each in columns]).cpu() for name in columns[0]})

    def split(self, counts: Sequence[int]) -> list[Predictions]:
        """The first so many positions, the next, and so on."""
        parts = {name: column.split(list(counts)) for name, column in self.columns().items()}
        return [self.from_columns({name: part[i] for name, part in parts.items()}) for i in range(len(counts))]

    def of(self, rows: Tensor) -> Predictions:
        """Those of some examples."""
        chosen = torch.isin(self.rows, rows)
        return self.from_columns({name: column[chosen] for name, column in self.columns().items()})

    def at(self, rows: Tensor) -> Predictions:
        """The same of other examples: the one at `rows[i]` in place of the i-th."""
        return replace(self, rows=rows[self.rows])


_COLUMNS = ("rows", "targets", "predicted", "probabilities", "losses")


def scores(task: Task, predictions: Predictions, rows: Tensor | None = None) -> dict[str, float]:
    """A task's metrics over all examples, or over some.

    Args:
        task: that the predictions are of.
        predictions: of any examples.
        rows: int64, the examples that count; all when left out.

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
        probabilities: [n], of what was predicted.
        correct: bool [n].
    """
    edges = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(probabilities.double(), edges)
    gaps = torch.bincount(bins, correct.double() - probabilities.double(), minlength=_BINS)
    return float(gaps.abs().sum() / len(bins))


def exact_match(rows: Tensor, correct: Tensor) -> float:
    """The share of examples all of whose positions are correct.

    Args:
        rows: int64 [n], the position's example.
        correct: bool [n].
    """
    examples, position = rows.unique(return_inverse=True)
    missed = torch.bincount(position, ~correct, minlength=len(examples))
    return float((missed == 0).double().mean())


def macro_f1(predicted: Tensor, targets: Tensor) -> float:
    """The mean over classes of `F1 = 2 |hits| / (|predicted| + |true|)`; of those that occur in either.

    Args:
        predicted: int64 [n], non-negative.
        targets: int64 [n], non-negative.
    """
    classes = int(torch.maximum(predicted.max(), targets.max())) + 1
    hits = torch.bincount(targets[predicted == targets], minlength=classes).double()
    named = torch.bincount(predicted, minlength=classes) + torch.bincount(targets, minlength=classes)
    return float((2 * hits[named > 0] / named[named > 0]).mean())
