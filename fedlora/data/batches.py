"""From examples to batches: padding, and the endless walk over a client's examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .examples import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest example.

    Args:
        examples: at least one, all of one task.
        pad_id: fills `input_ids`; it may be the end token, since labels are masked by position.

    Returns:
        `input_ids` and `attention_mask` [B, T], and `labels`: [B, T] with -100 at padding, or [B] for
        classification; all int64.
    """
    import torch

    ids = torch.full((len(examples), max(len(example.input_ids) for example in examples)), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    classes = []
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        if isinstance(example.labels, int):
            classes.append(example.labels)
        else:
            labels[row, :length] = torch.tensor(example.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(classes) if classes else labels}


def batch_at(num_examples: int, batch_size: int, index: int, seed: int) -> list[int]:
    """The examples of batch `index` of an endless walk; no state, so a client can resume anywhere.

    The walk is one permutation after the other: epoch e's is drawn from (seed, e), and a batch may reach from
    one epoch into the next.

    Args:
        num_examples: at least 1.
        batch_size: at least 1; it may exceed `num_examples`.
        index: 0 for the first batch.
        seed: differs between clients.
    """
    first = index * batch_size
    epochs = range(first // num_examples, (first + batch_size - 1) // num_examples + 1)
    walk = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_examples) for epoch in epochs])
    start = first % num_examples
    return walk[start : start + batch_size].tolist()


def eval_batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Every example's place once, those of like length together: the order does not matter, and padding costs least."""
    ordered = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
