"""Metrics of the same predictions for each value of a column of the rows, such as a domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from .base import Task
from .scores import Predictions, scores

# Endings of the names by which a comparison ranks: the mean over the values, each of which counts the same, and the
# worst value.
_ENDINGS = {"-mean-by": "mean", "-worst-by": "worst"}


@dataclass(frozen=True)
class Scored:
    """Metrics over all rows, and by value.

    Args:
        metrics: the metrics over all rows.
        by: "column": name of the column; "values": value -> metrics over its rows, and their number as "rows"; "mean"
            and "worst": each metric's mean over the values and its worst value. Empty without a column.
    """

    metrics: dict[str, float]
    by: dict[str, Any] = field(default_factory=dict)


def scored(task: Task, predictions: Predictions, column: str, groups: Mapping[str, np.ndarray]) -> Scored:
    """The metrics of predictions over all examples, and by value of a column.

    Args:
        task: the task to which the predictions belong.
        predictions: the predictions for all examples.
        column: name of the column; empty: no metrics by value.
        groups: value -> numbers of its examples, int64.

    Raises:
        DataError: these examples, or those of a value, have no labelled position.
    """
    whole = scores(task, predictions)
    if not column:
        return Scored(whole)
    values: dict[str, dict[str, float]] = {}
    for value, rows in groups.items():
        values[value] = {**scores(task, predictions, torch.from_numpy(rows)), "rows": len(rows)}
    each = {name: [metrics[name] for metrics in values.values()] for name in whole}
    return Scored(
        whole,
        {
            "column": column,
            "values": values,
            "mean": {name: fmean(found) for name, found in each.items()},
            "worst": {name: max(found) if name in task.lower else min(found) for name, found in each.items()},
        },
    )


def named(by: Mapping[str, Any]) -> dict[str, float]:
    """The means and worst values of `Scored.by` under the names that a comparison ranks by, as `accuracy-mean-by`."""
    return {f"{name}{end}": value for end, kind in _ENDINGS.items() for name, value in by.get(kind, {}).items()}


def plain(metric: str) -> str:
    """The metric of which `metric` is the mean over the values or the worst value; any other metric itself."""
    return next((metric.removesuffix(end) for end in _ENDINGS if metric.endswith(end)), metric)
