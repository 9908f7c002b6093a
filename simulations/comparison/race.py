"""Races: the cells of a grid that are worth running after those that have ended, by validation metrics alone.

- "none": all cells are run.
- "rates": successive halving (Karnin et al. 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson and
  Talwalkar 2016, arXiv 1502.07943) over each strategy's learning rates, with seeds as the budget. All rates run with
  the first seed. After each seed the better half of the rates, rounded up, goes on to the next one. The rate that is
  left runs with all other seeds.
- "arms": also strategies drop out. After the third seed and after each later one, a strategy ends when it is worse than
  the reference or than the leader beyond doubt: by a one-sided paired t-test over the seeds so far, at the level of 5 %
  divided by the number of all such tests in the scenario (Bonferroni). Differences that are all equal have no spread to
  test by, and end nothing. The reference never drops out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .grid import Cell, Grid
from .power import LEVEL
from .ranking import choose, lower_is_better, order, paired_p

FIRST_LOOK = 3  # seeds before a strategy may drop out: two differences have no spread to speak of

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is still to be run.

    Args:
        due: cells without a result that may run now, in the grid's order.
        later: at most so many more may follow, depending on the results of `due`.
        dropped: (scenario, label) of the strategies that have dropped out -> the seed after which they did.
    """

    due: tuple[Cell, ...]
    later: int
    dropped: Mapping[tuple[str, str], int]


def plan(grid: Grid, done: Results) -> Plan:
    """The cells of a grid that its race still admits.

    Args:
        grid: the comparison.
        done: path of a cell -> content of its JSON file, for the cells that ended.
    """
    if grid.race == "none":
        return Plan(tuple(cell for cell in grid.cells if cell.path not in done), 0, {})
    due: set[str] = set()
    later, dropped = 0, {}
    for scenario in grid.scenarios:
        fields = _fields(grid, scenario)
        for number, seed in enumerate(grid.seeds, start=1):
            for field in fields.values():
                if field.waits:
                    later += len(field.rates)
                else:
                    due |= {cell.path for cell in field.cells(seed) if cell.path not in done}
                field.go_on(seed, done)
            if grid.race == "arms" and number >= FIRST_LOOK:
                strategies = {label: field for label, field in fields.items() if field.role == "strategy"}
                if any(field.waits for field in strategies.values()):
                    for field in strategies.values():
                        field.waits = True
                else:
                    for label in [*_worse(grid, strategies, number)]:
                        dropped[scenario, label] = seed
                        del fields[label]
    return Plan(tuple(cell for cell in grid.cells if cell.path in due), later, dropped)


class _Field:
    """The learning rates of one strategy or baseline that are still in the race, and its results so far.

    `waits` says that results are missing on which the next seed's cells depend.
    """

    def __init__(self, cells: Sequence[Cell], metric: str) -> None:
        self._cells: dict[int, dict[float | None, Cell]] = defaultdict(dict)
        for cell in cells:
            self._cells[cell.seed][cell.lr] = cell
        self._metric = metric
        self._results: list[Mapping[str, Any]] = []
        self.role = cells[0].role
        self.rates: list[float | None] = [*dict.fromkeys(cell.lr for cell in cells)]
        self.waits = False

    def cells(self, seed: int) -> list[Cell]:
        """The cells of a seed at the rates that are left."""
        return [self._cells[seed][lr] for lr in self.rates]

    def go_on(self, seed: int, done: Results) -> None:
        """Leave the better half of the rates after a seed; while results are missing, only its size is right."""
        results = [done[cell.path] for cell in self.cells(seed) if cell.path in done]
        half = math.ceil(len(self.rates) / 2)
        self.waits = self.waits or len(results) < len(self.rates)
        if self.waits:
            self.rates = self.rates[:half]
            return
        self._results += results
        left = [cell for cell in self._results if cell["lr"] in self.rates]
        self.rates = [rate.lr for rate in order(left, self._metric)][:half]

    def validation(self) -> dict[int, float]:
        """Seed -> validation metric, at the best learning rate so far."""
        cells = choose(self._results, self._metric).cells
        return {seed: float(cell["scores"]["validation"][self._metric]) for seed, cell in cells.items()}


def _fields(grid: Grid, scenario: str) -> dict[str, _Field]:
    cells: dict[str, list[Cell]] = defaultdict(list)
    for cell in grid.cells:
        if cell.scenario == scenario:
            cells[cell.label].append(cell)
    return {label: _Field(found, grid.metric) for label, found in cells.items()}


def _worse(grid: Grid, fields: Mapping[str, _Field], number: int) -> Iterator[str]:
    """The strategies that are worse than the reference or the leader beyond doubt, after so many seeds."""
    looks = len(grid.seeds) - FIRST_LOOK  # after the last seed nothing is left to save
    if number - FIRST_LOOK >= looks:
        return
    level = LEVEL / (2 * looks * max(1, len(grid.labels) - 1))
    sign = -1.0 if lower_is_better(grid.metric) else 1.0
    known = {label: values for label, field in fields.items() if (values := field.validation())}
    leader = max(known, key=lambda label: sign * fmean(known[label].values()), default=grid.reference)
    for label, values in known.items():
        best = [known[other] for other in {leader, grid.reference} & known.keys() - {label}]
        if label != grid.reference and any(_beyond_doubt(values, other, sign, level) for other in best):
            yield label


def _beyond_doubt(values: Mapping[int, float], best: Mapping[int, float], sign: float, level: float) -> bool:
    seeds = sorted(values.keys() & best.keys())
    differences = [sign * (values[seed] - best[seed]) for seed in seeds]
    if len(seeds) < FIRST_LOOK or fmean(differences) >= 0:
        return False
    p = paired_p(differences, max(abs(of[seed]) for of in (values, best) for seed in seeds))
    return p is not None and p / 2 < level
