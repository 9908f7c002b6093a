"""Races: which cells the results of others leave out, and that a comparison runs no others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.common.errors import ConfigError
from fedlora.simulations.comparison.grid import Cell, Grid
from fedlora.simulations.comparison.race import Plan, plan
from fedlora.simulations.comparison.ranking import choose
from tests.simulations.comparison.test_grid import HEAD, SETTINGS, grid_of

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
Loss = Callable[[Cell], float | None]


def grid_with(folder: Path, race: str, seeds: int = 5, **more: str) -> Grid:
    head = HEAD.replace("[2e-3, 1e-3]", str(RATES)).replace("[0, 7]", str([*range(seeds)]))
    for old, new in more.items():
        head = head.replace(old, new)
    return grid_of(folder, f'race = "{race}"\n{head}{SETTINGS}')


def result(cell: Cell, loss: float | None) -> dict[str, Any]:
    """A cell's result with a validation loss, and test losses of the opposite order, which must choose nothing."""
    scores = {"validation": {"loss": loss}, "test": {"loss": None if loss is None else -loss}}
    about = {"scenario": cell.scenario, "label": cell.label, "role": cell.role, "lr": cell.lr, "seed": cell.seed}
    return {**about, "status": "failed" if loss is None else "completed", "scores": scores}


def played(grid: Grid, loss: Loss, slots: int = 3, seed: int = 0) -> tuple[list[Cell], Plan, list[Plan]]:
    """Run what a race admits, some cells at a time in any order; the cells, the last plan, and all plans."""
    rng, done, ran, plans = random.Random(seed), {}, [], [plan(grid, {})]
    while plans[-1].due:
        for cell in rng.sample(plans[-1].due, min(slots, len(plans[-1].due))):
            done[cell.path] = result(cell, loss(cell))
            ran.append(cell)
        plans.append(plan(grid, done))
    return ran, plans[-1], plans


def by_seed(cells: list[Cell], label: str) -> list[list[float | None]]:
    return [sorted(cell.lr for cell in cells if cell.label == label and cell.seed == seed) for seed in range(5)]  # type: ignore[type-var]


def test_without_a_race_all_cells_are_due(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, "none")
    ran, last, _ = played(grid, lambda cell: None)
    assert {cell.path for cell in ran} == {cell.path for cell in grid.cells}
    assert (last.later, dict(last.dropped)) == (0, {})


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_after_each_seed_the_better_half_of_the_rates_goes_on(tmp_path: Path, slots: int) -> None:
    best = {"flora": 4e-3, "fedsa": 1.6e-2}
    grid = grid_with(tmp_path, "rates")
    ran, _, plans = played(grid, lambda cell: abs((cell.lr or 0) - best[cell.label]), slots)
    assert by_seed(ran, "flora") == [RATES, RATES[:3], RATES[1:3], [4e-3], [4e-3]]
    assert by_seed(ran, "fedsa") == [RATES, RATES[2:], RATES[3:], [1.6e-2], [1.6e-2]]
    # 5 + 3 + 2 + 1 + 1 of each, foreseen exactly from the beginning
    ends = [len({cell.path for cell in ran}) - (len(each.due) + each.later) for each in (plans[0], plans[-1])]
    assert ends == [0, 24]


def test_later_seeds_count_and_a_failure_loses_to_every_number(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, "rates")

    def loss(cell: Cell) -> float | None:
        if cell.lr == 1e-3:
            return None
        # with the first seed 2e-3 is best; the mean of two is best at 4e-3
        return {2e-3: [0.0, 9.0], 4e-3: [1.0, 1.0], 8e-3: [2.0, 2.0]}.get(cell.lr or 0, [5.0, 5.0])[cell.seed > 0]

    ran, _, _ = played(grid, loss)
    assert by_seed(ran, "flora") == [RATES, [2e-3, 4e-3, 8e-3], [4e-3, 8e-3], [4e-3], [4e-3]]
    done = [result(cell, loss(cell)) for cell in ran if cell.label == "flora"]
    chosen = choose(done, "loss")
    assert (chosen.lr, sorted(chosen.cells)) == (4e-3, [0, 1, 2, 3, 4])


def test_a_rate_with_one_lucky_seed_is_not_chosen_over_the_winner(tmp_path: Path) -> None:
    """After the race, the winner's mean over five seeds may be worse than a loser's first seed."""
    grid = grid_with(tmp_path, "rates")
    ran, _, _ = played(grid, lambda cell: {4e-3: 1.0, 8e-3: 2.0}.get(cell.lr or 0, 3.0) if cell.seed < 2 else 99.0)
    done = [result(cell, 99.0 if cell.seed > 1 else {4e-3: 1.0}.get(cell.lr or 0, 3.0)) for cell in ran]
    assert choose([cell for cell in done if cell["label"] == "flora"], "loss").lr == 4e-3


def noisy(seed: int, worse: float) -> Loss:
    def loss(cell: Cell) -> float:
        own = random.Random(f"{seed}/{cell.path}").gauss(0, 0.01)
        shared = random.Random(f"{seed}/{cell.seed}").gauss(0, 0.3)  # common random numbers: pairs cancel it
        return 2.0 + own + shared + (worse if cell.label == "fedsa" else 0.0)

    return loss


def test_a_strategy_that_is_worse_beyond_doubt_drops_out_and_a_reference_never(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, "arms", reference="flora", **{"metric": 'reference = "flora"\nmetric'})
    ran, last, _ = played(grid, noisy(0, worse=1.0))
    assert dict(last.dropped) == {("default", "fedsa"): 2}
    assert {cell.seed for cell in ran if cell.label == "fedsa"} == {0, 1, 2}
    assert {cell.seed for cell in ran if cell.label == "flora"} == {0, 1, 2, 3, 4}
    _, last, _ = played(grid, noisy(0, worse=-1.0))
    assert dict(last.dropped) == {}


def test_differences_that_are_all_equal_are_not_beyond_doubt(tmp_path: Path) -> None:
    """With few validation rows, three accuracies can differ by one row each: of their spread nothing is known."""
    grid = grid_with(tmp_path, "arms", **{"metric": 'reference = "flora"\nmetric'})
    one_row = 1 / 100
    _, last, _ = played(grid, lambda cell: 0.3 + cell.seed / 10 + (one_row if cell.label == "fedsa" else 0.0))
    assert dict(last.dropped) == {}


def test_equal_strategies_drop_out_more_seldom_than_the_level_says(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, "arms", seeds=6, **{"metric": 'reference = "flora"\nmetric'})
    ended = [played(grid, noisy(seed, worse=0.0), slots=9)[1].dropped for seed in range(60)]
    assert sum(map(bool, ended)) <= 4  # 5 % of 60 would be 3


def test_a_race_that_is_unknown_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"race = 'rate'.*did you mean 'rates'"):
        grid_with(tmp_path, "rate")
