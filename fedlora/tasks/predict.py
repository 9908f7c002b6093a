"""The predictions of a model for a data set, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedlora.data import Example, eval_batches

from .base import Task
from .checked import check_batch, check_predictions
from .scores import Predictions, scores


def predict(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """The model's predictions for a data set, moved to the CPU. Only one batch's logits are in memory at a time.

    Args:
        task: the task to which the examples belong.
        model: the model with its adapter.
        examples: the data set, at least one example.
        batch_size: examples per forward pass.
        pad_id: token that fills up shorter rows of a batch on the right.
        on_batch: called after each batch with (number of examples done, number of all examples).
    """
    kept = list(examples)
    parts: list[Predictions] = []
    done, was_training = 0, model.training
    model.eval()
    with torch.no_grad():
        for chosen in eval_batches(kept, batch_size):
            batch = check_batch(task, task.collate([kept[index] for index in chosen], pad_id), len(chosen))
            found = check_predictions(task, task.predict(model, batch))
            parts.append(found.at(torch.tensor(chosen, device=found.rows.device)))
            done += len(chosen)
            on_batch(done, len(kept))
    model.train(was_training)
    return Predictions.joined(parts)


def evaluate(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """The `scores` of the model's predictions for a data set; arguments as in `predict`."""
    return scores(task, predict(task, model, examples, batch_size, pad_id, on_batch=on_batch))
