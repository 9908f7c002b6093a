"""From examples to batches: padding, and the endless walk over a client's examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .examples import Example

if TYPE_CHECKING:
    from torch import Tensor


def collate(examples: Sequence[Example], fill: Mapping[str, float]) -> dict[str, Tensor]:
    """The examples' arrays as one batch: each padded along its first axis, on the right, to the longest of its name.

    Args:
        examples: at least one, all of one task.
        fill: by the name of an array, what it is padded with.

    Returns:
        Name -> [B, …]; one number of each example is [B].
    """
    import torch

    batch: dict[str, Tensor] = {}
    for name in examples[0].arrays:
        values = [torch.as_tensor(example[name]) for example in examples]
        if not values[0].ndim:
            batch[name] = torch.stack(values)
            continue
        longest = max(len(value) for value in values)
        whole = values[0].new_full((len(values), longest, *values[0].shape[1:]), fill.get(name, 0))
        for place, value in zip(whole, values, strict=True):
            place[: len(value)] = value
        batch[name] = whole
    return batch


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
    ordered = sorted(range(len(examples)), key=lambda place: examples[place].size)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
