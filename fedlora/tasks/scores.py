"""Metrics of predictions: loss, accuracy, macro F1, exact match, calibration error; over all examples or some."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.common.errors import DataError

# Every name that `scores` gives.
METRICS = frozenset({"loss", "accuracy", "perplexity", "macro-f1", "exact-match", "calibration-error"})

# Bins of confidence, as in Guo et al. 2017, section 5.
_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a model said wherever there was a label to predict: n positions, on the CPU.

    Attributes:
        rows: int64 [n], the position's example, counted as the examples were given.
        targets: int64 [n], the true token or class.
        predicted: int64 [n], the most probable one; for a causal model after the true prefix.
        probabilities: fp32 [n], of `predicted`.
        losses: fp32 [n], minus the logarithm of the target's probability (nats).
        classes: 0 for a causal model, else the number of classes.
    """

    rows: Tensor
    targets: Tensor
    predicted: Tensor
    probabilities: Tensor
    losses: Tensor
    classes: int


def scores(predictions: Predictions, rows: Tensor | None = None) -> dict[str, float]:
    """Metrics over all examples, or over some.

    Args:
        predictions: of any examples.
        rows: int64, the examples that count; all when left out.

    Returns:
        `loss` (nats), `accuracy` (of the next token, or of the class) and `calibration-error`, each over all labelled
        positions; for a classifier `macro-f1`, the mean of the F1 of each class that occurs among targets or
        predictions; for a causal model `perplexity` and `exact-match`, the share of examples whose every labelled
        token is the most probable one after the true prefix, which is to say: whose label greedy generation gives.

    Raises:
        DataError: these examples have no labelled position.
    """
    chosen = _all(predictions) if rows is None else torch.isin(predictions.rows, rows)
    targets, predicted = predictions.targets[chosen], predictions.predicted[chosen]
    if not len(targets):
        raise DataError("there is no labelled token to evaluate on; raise data.max-length or give more held-out rows")
    correct = predicted == targets
    result = {
        "loss": float(predictions.losses[chosen].double().mean()),
        "accuracy": float(correct.double().mean()),
        "calibration-error": calibration_error(predictions.probabilities[chosen], correct),
    }
    if predictions.classes:
        return result | {"macro-f1": macro_f1(predicted, targets)}
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    return result | {"exact-match": exact_match(predictions.rows[chosen], correct)}


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


def _all(predictions: Predictions) -> slice:
    return slice(0, len(predictions.rows))
