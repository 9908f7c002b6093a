"""What the model in place predicts for a data set, and its metrics."""

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
    """What the model says of a data set, on the CPU; one batch's logits are held at a time.

    Args:
        task: that the examples are of.
        model: with its adapter in place.
        examples: at least one.
        batch_size: examples per forward pass.
        pad_id: fills the batches' right side.
        on_batch: called after each batch with (examples done, examples).
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
    """The `scores` of what the model predicts for a data set; see `predict` for the arguments."""
    return scores(task, predict(task, model, examples, batch_size, pad_id, on_batch=on_batch))
