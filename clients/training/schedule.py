"""The steps of a round, their examples and learning rates, and seeds."""

from __future__ import annotations

import math

from fedlora.config import TrainConfig
from fedlora.data import batch_at


def steps_per_round(config: TrainConfig, num_examples: int) -> int:
    """The number of optimizer steps in one round: `train.steps`, or as many as `train.epochs` needs."""
    per_step = config.batch_size * config.accumulate
    return config.steps or max(1, math.ceil(config.epochs * num_examples / per_step))


def examples_of(config: TrainConfig, num_examples: int, number: int, seed: int) -> list[int]:
    """The numbers of the examples that a round trains on, each once and in ascending order."""
    steps, parts = steps_per_round(config, num_examples), config.accumulate
    batches = range((number - 1) * steps * parts, number * steps * parts)
    return sorted({at for index in batches for at in batch_at(num_examples, config.batch_size, index, seed)})


def lr_factor(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate at a step of the whole run, as a share of `train.lr`: first the warm-up, then the schedule.

    Cosine and linear end just above zero, so that the last step still trains.
    """
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.schedule == "linear" else 1.0


def hash_seed(*parts: int) -> int:
    """One seed made from several numbers; it is the same in every process."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
