"""Checks of what a task returns, so that a wrong shape ends in one sentence instead of being trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.common.errors import TaskError

from .base import Batch, Task
from .scores import Predictions


def mean_loss(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """The mean of all losses of a batch."""
    return each_loss(task, model, batch)[0].mean()


def each_loss(task: Task, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """`task.losses`, checked.

    Raises:
        TaskError: the task did not return two tensors of one length.
    """
    found: Any = task.losses(model, batch)
    fits = (
        isinstance(found, tuple)
        and len(found) == 2
        and all(isinstance(part, Tensor) and part.ndim == 1 for part in found)
        and len(found[0]) == len(found[1])
        and found[0].is_floating_point()
        and not found[1].is_floating_point()
    )
    if not fits:
        raise _wrong(task, "losses", found, "all losses [n], and the number of each one's row in the batch, int64 [n]")
    return found


def row_losses(task: Task, model: nn.Module, batch: Batch, rows: int) -> Tensor:
    """For each row of a batch, the mean of its own losses; 0 for a row that has none."""
    each, row = each_loss(task, model, batch)
    counts = torch.bincount(row, minlength=rows).clamp(min=1)
    return torch.zeros(rows, device=each.device, dtype=each.dtype).index_add(0, row, each) / counts


def check_batch(task: Task, batch: Batch, rows: int) -> Batch:
    """The batch, after a check of its number of rows, and of the task's counts of tokens and losses in each row.

    Raises:
        TaskError: the number of rows or a count is wrong.
    """
    whole = isinstance(batch, dict) and batch and all(isinstance(array, Tensor) for array in batch.values())
    if not whole or any(not array.ndim or len(array) != rows for array in batch.values()):
        raise _wrong(task, "collate", batch, f"a dictionary of tensors, each with {rows} rows, one for each example")
    for name in ("tokens", "counts"):
        found: Any = getattr(task, name)(batch)
        if not isinstance(found, Tensor) or found.shape != (rows,) or found.is_floating_point():
            raise _wrong(task, name, found, f"a whole number for each row, int64 [{rows}]")
    return batch


def check_predictions(task: Task, found: Predictions) -> Predictions:
    """The predictions, after a check that all columns have one length.

    Raises:
        TaskError: a column has another length.
    """
    if not isinstance(found, Predictions):
        raise _wrong(task, "predict", found, "fedlora.tasks.scores.Predictions")
    positions = len(found.rows) if found.rows.ndim else -1
    for name, column in found.columns().items():
        if not column.ndim or len(column) != positions:
            raise _wrong(task, f"predict: {name}", column, f"one entry for each of the {positions} positions in rows")
    return found


def check_scores(task: Task, found: Mapping[str, float]) -> dict[str, float]:
    """The scores, after a check that there is one number for each of the task's metrics.

    Raises:
        TaskError: a metric is missing or is not one of the task's.
    """
    if not isinstance(found, dict) or found.keys() != task.metrics:
        got = ", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__
        raise TaskError(
            f"{_name(task)}.scores returned {got}, expected a number for each of {', '.join(sorted(task.metrics))}"
        )
    return {name: float(value) for name, value in found.items()}


def _wrong(task: Task, method: str, got: object, expected: str) -> TaskError:
    return TaskError(f"{_name(task)}.{method} returned {_shown(got)}, expected {expected}")


def _name(task: Task) -> str:
    return f"model.task: {type(task).__module__}:{type(task).__qualname__}"


def _shown(got: object) -> str:
    if isinstance(got, Tensor):
        return f"a tensor of shape {tuple(got.shape)} and type {str(got.dtype).removeprefix('torch.')}"
    if isinstance(got, tuple | list):
        return f"({', '.join(map(_shown, got[:4]))})"
    if isinstance(got, dict):
        return "{" + ", ".join(f"{name}: {_shown(value)}" for name, value in got.items()) + "}"
    return f"a {type(got).__name__}"
