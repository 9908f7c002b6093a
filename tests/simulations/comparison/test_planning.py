"""How many seeds a comparison needs, by a pilot's spread, and the command that says it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.common.errors import ConfigError, RunError
from fedlora.simulations.comparison.planning import Need, needs
from fedlora.simulations.comparison.power import power
from fedlora.simulations.comparison.ranking import rank
from tests.simulations.comparison.test_grid import WHOLE, grid_of
from tests.simulations.comparison.test_standing import result

GRID = 'reference = "flora"\n' + WHOLE.replace("[2e-3, 1e-3]", "[1e-3]").replace("[0, 7]", "[0, 1, 2]")
LOSSES = {"flora": [1.0, 2.0, 3.0], "fedsa": [1.1, 2.0, 3.3], "rolora-slow": [2.0, 3.0, 4.0]}


def of_pilot(folder: Path, difference: float) -> list[Need]:
    cells = grid_of(folder, GRID).cells
    return needs(rank([result(cell, LOSSES[cell.label][cell.seed]) for cell in cells], "loss", "flora"), difference)


def test_the_spread_is_that_of_paired_differences_and_the_seeds_are_enough(tmp_path: Path) -> None:
    found = of_pilot(tmp_path, 0.2)
    assert [(need.scenario, need.label) for need in found] == [("full", "fedsa"), ("half", "fedsa")]
    need = found[0]
    assert need.pairs == 3
    assert need.spread == pytest.approx(stdev([0.1, 0.0, 0.3]))  # seeds differ by 1, which pairing takes out
    assert need.seeds is not None
    assert power(0.2, need.spread, need.seeds) >= 0.8 > power(0.2, need.spread, need.seeds - 1)
    assert need.sure is not None
    assert need.sure > need.seeds
    assert power(0.2, need.bound, need.sure, 0.05) >= 0.8


def test_the_bound_is_below_the_true_spread_in_one_case_of_five(tmp_path: Path) -> None:
    factor = (need := of_pilot(tmp_path, 0.2)[0]).bound / need.spread
    samples = np.random.default_rng(0).normal(0.0, 1.0, (40_000, 3))
    assert float((factor * samples.std(axis=1, ddof=1) < 1.0).mean()) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("difference", [0.0, -1.0, float("nan"), float("inf")])
def test_a_difference_that_is_none_is_refused(tmp_path: Path, difference: float) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        of_pilot(tmp_path, difference)


def test_without_a_pilot_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no strategy has two seeds in common"):
        needs(rank([result(cell, 1.0) for cell in grid_of(tmp_path, GRID).cells[:3]], "loss", "flora"), 0.1)


def test_the_command_reads_the_cells_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for cell in grid_of(tmp_path, GRID).cells:
        file = tmp_path / "runs" / "compare" / "mine" / "cells" / f"{cell.path}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**result(cell, LOSSES[cell.label][cell.seed]), "config": cell.keys()}))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["compare", "compare-mine.toml", "--plan", "0.2"])
    assert done.exit_code == 0
    assert "seeds that show a difference of 0.2 in loss from flora" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "fedsa" in line]
    need = of_pilot(tmp_path, 0.2)[0]
    assert [part.strip() for part in lines[0].strip("│").split("│")[2:]] == [
        "3",
        f"{need.spread:.4f}",
        str(need.seeds),
        str(need.sure),
    ]
    assert sorted(tmp_path.rglob("*")) == before
