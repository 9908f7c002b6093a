"""What this node's rows have cost so far, in privacy: an account in its own state folder, and its limit.

The account has all rounds that were begun here, of all runs and servers: a round that is asked twice is counted twice,
and one that fails is counted too. Everything in it is what this node knows itself: the noise that it adds, the rate at
which it draws rows, and its steps. A server's word for how many rounds there were, or for delta, does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from flwr.app import Context

from fedlora.common import accountant
from fedlora.common.errors import ConfigError, DataError
from fedlora.common.files import write_json
from fedlora.config import Config
from fedlora.exchange.privacy import mechanism

from . import own_state, rules

# Below it, a step in which a row takes part costs an epsilon of hundreds, and counting that takes minutes.
_LEAST_NOISE = 0.1


class Entry(TypedDict):
    """Rounds of one run, all with the same mechanism; see `accountant.Releases`."""

    run: str
    noise_multiplier: float
    rate: float
    steps: int
    rounds: int


def charge(config: Config, context: Context, run: str, num_examples: int) -> None:
    """Enter one round into the account, before it begins; without `max-epsilon`, there is none.

    Args:
        config: of the run, as `rules.ruled` let it through.
        context: of this run and client.
        run: the run's key, so that a reader of the account can tell runs apart; it decides nothing.
        num_examples: number of the client's training rows.

    Raises:
        ConfigError: the round would bring epsilon above the limit, or has next to no noise. It is then not in the
            account.
        DataError: the account cannot be read.
    """
    most, delta = rules.most_epsilon(context.node_config)
    made = mechanism(config, num_examples) if most else None
    if made is None:
        return
    if made.noise_multiplier < _LEAST_NOISE:
        raise ConfigError(
            f"the run's noise is {made.noise_multiplier:.2g} times privacy.clip, and this node takes part with at "
            f"least {_LEAST_NOISE:g} times (node config: max-epsilon)"
        )
    path = _account(context)
    with _alone(path):
        entries = _read(path)
        mine: Entry = {
            "run": run or str(context.run_id),
            "noise_multiplier": made.noise_multiplier,
            "rate": made.rate,
            "steps": made.per_round,
            "rounds": 1,
        }
        same = next((each for each in entries if {**each, "rounds": 1} == mine), None)
        if same is None:
            entries.append(mine)
        else:
            same["rounds"] += 1
        after = epsilon(entries, delta)
        if after > most:
            raise ConfigError(
                f"one more round would bring the epsilon of this node's rows to {after:.4g} at delta {delta:g}, and "
                f"this node allows at most {most:g} over all runs (node config: max-epsilon)"
            )
        write_json(path, entries)


def epsilon(entries: list[Entry], delta: float) -> float:
    """What all entries together have cost."""
    counts: dict[tuple[float, float], int] = {}
    for each in entries:
        key = each["noise_multiplier"], each["rate"]
        counts[key] = counts.get(key, 0) + each["steps"] * each["rounds"]
    return accountant.composed(tuple((*key, count) for key, count in sorted(counts.items())), delta)


def _account(context: Context) -> Path:
    """The account of the rows here: one for the node's own file, else one for each client that its config names.

    A number that a server gives names no account, since another server would give another one.
    """
    node = context.node_config
    name = "client-{}".format(node["partition-id"]) if "partition-id" in node and not rules.own_data(node) else "own"
    return own_state.root_of(context) / "spent" / f"{name}.json"


def _read(path: Path) -> list[Entry]:
    try:
        return [_checked(each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: the account of what this node's rows have cost cannot be read: {error}; restore it, or remove it "
            "and lower max-epsilon by what was spent"
        ) from None


def _checked(entry: Mapping[str, object]) -> Entry:
    run, noise, rate, steps, rounds = (entry[key] for key in Entry.__annotations__)
    if not (isinstance(noise, int | float) and isinstance(rate, int | float) and noise > 0 and 0 < rate <= 1):
        raise ValueError(f"noise {noise!r} and rate {rate!r}")
    if not (isinstance(steps, int) and isinstance(rounds, int) and steps > 0 and rounds > 0):
        raise ValueError(f"steps {steps!r} and rounds {rounds!r}")
    return {"run": str(run), "noise_multiplier": noise, "rate": rate, "steps": steps, "rounds": rounds}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process of this node changes the account within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
