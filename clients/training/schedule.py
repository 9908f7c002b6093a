"""The steps of a round, their examples and learning rates, and seeds."""

from __future__ import annotations

import math

from fedlora.config import TrainConfig, steps_per_round
from fedlora.data import batch_at
from fedlora.exchange import Plan


def examples_of(config: TrainConfig, num_examples: int, number: int, seed: int) -> list[int]:
    """The numbers of the examples that a round trains on, each once and in ascending order."""
    steps, parts = steps_per_round(config, num_examples), config.accumulate
    batches = range((number - 1) * steps * parts, number * steps * parts)
    return sorted({at for index in batches for at in batch_at(num_examples, config.batch_size, index, seed)})


def warmup_of(config: TrainConfig, plan: Plan, steps: int, rounds: int) -> tuple[int, int]:
    """(the first step, the number of steps) of the warm-up that holds in a round.

    With `train.warmup = run` there is one, at the beginning of the run. With `link` there is one at the beginning of
    each link, which is the time from an adapter's start to its end in a fold.

    Args:
        config: the run's section train.
        plan: says when the present adapter began, and how many rounds it lasts.
        steps: number of steps in each round.
        rounds: number of rounds of the whole run.
    """
    links = config.warmup == "link"
    first, length = ((plan.begun - 1) * steps, plan.span or rounds) if links else (0, rounds)
    return first, round(config.warmup_fraction * (length * steps))


def lr_factor(config: TrainConfig, step: int, total: int, warmup: tuple[int, int] | None = None) -> float:
    """The learning rate at a step of the whole run, as a share of `train.lr`: the schedule, times the warm-up.

    The schedule falls over the whole run, from the end of its first warm-up on. Cosine and linear end just above zero,
    so that the last step still trains.

    Args:
        config: the run's section train.
        step: number of the step in the whole run, from 0.
        total: number of steps of the whole run.
        warmup: see `warmup_of`; the one of the run when left out.
    """
    first, length = warmup or (0, round(config.warmup_fraction * total))
    rise = min(1.0, (step - first + 1) / length) if length else 1.0
    progress = max(0, step - length) / max(1, total - length)
    if config.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (1.0 - progress) if config.schedule == "linear" else rise


def hash_seed(*parts: int) -> int:
    """One seed made from several numbers; it is the same in every process."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return seed
