"""Batches of examples: their padding, and the endless sequence in which a client trains on its examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .examples import Example

if TYPE_CHECKING:
    from torch import Tensor


def collate(examples: Sequence[Example], fill: Mapping[str, float]) -> dict[str, Tensor]:
    """The examples as one batch. Arrays of one name are padded on the right of their first axis to the longest of them.

    Args:
        examples: at least one example, all of one task.
        fill: name of an array -> value with which it is padded; 0 for other arrays.

    Returns:
        Name of an array -> tensor [B, …]; if an example has a single number under the name, the tensor is [B].
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
    """The numbers of the examples in batch `index` of an endless sequence.

    The sequence is one permutation of all examples after another. That of epoch e depends on (seed, e) alone, so that a
    client can resume anywhere. A batch may reach from one epoch into the next.

    Args:
        num_examples: number of the client's examples, at least 1.
        batch_size: number of examples in a batch, at least 1; it may exceed `num_examples`.
        index: number of the batch, from 0.
        seed: the client's seed.
    """
    first = index * batch_size
    epochs = range(first // num_examples, (first + batch_size - 1) // num_examples + 1)
    walk = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_examples) for epoch in epochs])
    start = first % num_examples
    return walk[start : start + batch_size].tolist()


def eval_batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Batches with each example's number once. To need little padding, examples of similar length share a batch."""
    ordered = sorted(range(len(examples)), key=lambda place: examples[place].size)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
