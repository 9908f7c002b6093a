"""How many seeds a comparison needs to show a difference of a given size, by the spread of a pilot's cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy.stats import chi2

from fedlora.common.errors import ConfigError, RunError

from .power import LEVEL, POWER, seeds_needed
from .ranking import Ranking

_CONFIDENCE = 0.8  # of the bound on the spread (Browne 1995, "On the use of a pilot sample for sample size ...")


@dataclass(frozen=True)
class Need:
    """The seeds that one strategy's comparison with the reference needs.

    Args:
        scenario, label: the strategy.
        pairs: number of seeds of the pilot.
        spread: standard deviation of its differences from the reference over these seeds.
        bound: a spread that the true one exceeds with a probability of 20 %; far above `spread` with few seeds.
        seeds: seeds for one test, if the true spread is `spread`; None: more than can be counted.
        sure: seeds for the first of Holm's tests, if the true spread is `bound`.
    """

    scenario: str
    label: str
    pairs: int
    spread: float
    bound: float
    seeds: int | None
    sure: int | None


def needs(rankings: Sequence[Ranking], difference: float) -> list[Need]:
    """What each strategy needs so that a true difference of this size is found with a probability of 80 % at 5 %.

    Args:
        rankings: of the pilot, by scenario.
        difference: the smallest difference of interest, in the metric's unit.

    Raises:
        ConfigError: the difference is no number above 0.
        RunError: no strategy has two seeds in common with the reference.
    """
    if not 0 < difference < math.inf:
        raise ConfigError(f"--plan {difference:g}: expected a number above 0, such as 0.01 for one point of accuracy")
    found: list[Need] = []
    for ranking in rankings:
        rows = [row for row in ranking.rows if row.role == "strategy" and row.spread]
        for row in rows:
            assert row.spread is not None
            bound = row.spread * math.sqrt((row.pairs - 1) / chi2.ppf(1 - _CONFIDENCE, row.pairs - 1))
            alone = seeds_needed(difference, row.spread)
            sure = seeds_needed(difference, bound, LEVEL / len(rows))
            found.append(Need(ranking.scenario, row.label, row.pairs, row.spread, bound, alone, sure))
    if not found:
        raise RunError(
            "--plan needs the cells of a pilot, and here no strategy has two seeds in common with the reference; run "
            "the grid with two or three seeds first"
        )
    return found


def plan_table(found: Sequence[Need], difference: float, metric: str, reference: str) -> Table:
    """The needs as a table with a sentence on how it is read."""
    table = Table(title=f"seeds that show a difference of {difference:g} in {metric} from {reference}")
    for heading in ("scenario", "", "pilot's seeds", "spread", "seeds", "seeds to be sure"):
        table.add_column(heading, justify="left" if heading in ("scenario", "") else "right")
    for need in found:
        numbers = (str(need.pairs), f"{need.spread:.4f}", _count(need.seeds), _count(need.sure))
        table.add_row(need.scenario, need.label, *numbers)
    table.caption = (
        f"Each true difference of this size is found with a probability of {POWER:.0%}: by one test at {LEVEL:.0%} if "
        "differences vary as in the pilot (seeds); also as the first of Holm's tests, and if they vary as much as the "
        f"pilot allows at {_CONFIDENCE:.0%} (seeds to be sure)."
    )
    return table


def _count(seeds: int | None) -> str:
    return "over 10000" if seeds is None else str(seeds)
