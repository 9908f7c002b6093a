"""What a comparison says while it runs, and the commands around it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.common.errors import FedLoraError
from fedlora.simulations.comparison.compare import Slot, Standing
from fedlora.simulations.comparison.grid import Cell, Grid
from fedlora.simulations.comparison.ranking import rank
from fedlora.simulations.comparison.standing import StandingDisplay, overview, ranking_table
from tests.simulations.comparison.test_grid import WHOLE, grid_of

FIRST, SECOND = "full/flora/lr0.001-seed0", "full/flora/lr0.002-seed0"


def result(cell: Cell, loss: float | None, **more: Any) -> dict[str, Any]:
    scores = {name: {"loss": loss, "examples": 4, "clients": {}} for name in ("validation", "test")}
    about = {"scenario": cell.scenario, "label": cell.label, "role": cell.role, "lr": cell.lr, "seed": cell.seed}
    return {"schema": 1, **about, "status": "completed", "seconds": 61.0, "scores": scores, "runs": [], **more}


@pytest.fixture
def standing(tmp_path: Path) -> Standing:
    grid = grid_of(tmp_path, WHOLE)
    return Standing(grid, [Slot("cuda:0"), Slot()], remaining=len(grid.cells))


def cell_at(grid: Grid, path: str) -> Cell:
    return next(cell for cell in grid.cells if cell.path == path)


def text_of(shown: Any) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_lines_where_there_is_no_terminal(standing: Standing) -> None:
    grid, written = standing.grid, io.StringIO()
    display = StandingDisplay(Console(file=written, width=60, highlight=False))
    with display.shown():
        standing.done[FIRST] = result(cell_at(grid, FIRST), 1.25)
        standing.remaining = 23
        display(standing)
        display(standing)
        standing.done[SECOND] = result(cell_at(grid, SECOND), 1.0)
        standing.taken, standing.remaining = [60.0, 60.0], 22
        display(standing)
        broken = "half/fedsa/lr0.001-seed7"
        standing.done[broken] = {**result(cell_at(grid, broken), None), "status": "failed", "error": "it [broke]"}
        endless = "half/fedsa/lr0.002-seed7"
        standing.done[endless] = result(cell_at(grid, endless), None)
        standing.remaining = 0
        display(standing)
    assert written.getvalue().splitlines() == [
        "1 of 24 cells are finished already",
        f"2/24  {SECOND}  loss 1.0000  61 s, 22 cells to go, about 11 min",
        f"4/4  {broken}  failed: it [broke]  61 s, all done",
        f"4/4  {endless}  loss not finite  61 s, all done",
    ]


def test_a_table_on_a_terminal(standing: Standing, tmp_path: Path) -> None:
    grid = standing.grid
    for path, loss in ((FIRST, 1.25), (SECOND, 1.0), ("full/flora/lr0.002-seed7", 3.0)):
        standing.done[path] = result(cell_at(grid, path), loss)
    broken = "half/fedsa/lr0.001-seed7"
    standing.done[broken] = {**result(cell_at(grid, broken), None), "status": "failed", "error": "broke"}
    record = tmp_path / "work" / "run" / "0" / "result.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"rounds": [{}, {}], "config": {"federation.rounds": 3}}))
    running = cell_at(grid, "half/flora/lr0.001-seed0")
    standing.running = {0: (running, time.monotonic() - 5, tmp_path / "work"), 1: (running, 0.0, tmp_path / "none")}
    standing.taken, standing.remaining = [120.0], 20
    shown = text_of(overview(standing))
    assert "mine: 4 of 24 cells; best loss (validation)" in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert "1.2500  3/4" in rows["flora"]  # the lower of 1.25 at one rate, and 2 at the other
    assert "0/4" in rows["flora"]
    assert "1/4, 1 failed" in rows["fedsa"]
    assert "cuda:0 1: half/flora/lr0.001-seed0  round 2/3  5 s" in shown
    assert "slot 2: half/flora/lr0.001-seed0  starting" in shown
    assert "20 cells to go, about 20 min" in shown


def test_the_live_table_is_shown_and_taken_away(standing: Standing) -> None:
    written = io.StringIO()
    display = StandingDisplay(Console(file=written, force_terminal=True, width=120))
    with display.shown():
        display(standing)
    assert "24 cells to go" in written.getvalue()
    assert "are finished already" not in written.getvalue()


def test_the_ranking_is_a_table(standing: Standing) -> None:
    for number, cell in enumerate(standing.grid.cells):
        if cell.scenario == "full":
            standing.done[cell.path] = result(cell, 1.0 + number / 10)
    (ranking,) = rank(list(standing.done.values()), "loss", "flora")
    shown = text_of(ranking_table(ranking))
    assert "full: loss on test rows, at the learning rate chosen by validation" in shown
    assert "0.001 *" in shown
    assert "at the end of the sweep" in shown
    assert [line.split()[3] for line in shown.splitlines() if line.startswith("│")] == ["flora", "fedsa", "rolora-slow"]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.toml").write_text(WHOLE, encoding="utf-8")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words))


def test_a_dry_run_lists_cells_and_runs_nothing(call, tmp_path: Path) -> None:
    done = call("compare", "mine.toml", "--dry-run")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert len(lines) == 25
    assert lines[0] == FIRST
    assert lines[-1] == f"24 cells, 0 completed and 0 failed in {tmp_path / 'runs' / 'compare' / 'mine'}"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_is_there(call, tmp_path: Path) -> None:
    grid = grid_of(tmp_path, WHOLE)
    for path, status in ((FIRST, "completed"), (SECOND, "failed")):
        file = tmp_path / "out" / "cells" / f"{path}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        cell = cell_at(grid, path)
        file.write_text(json.dumps({**result(cell, 1.0), "config": cell.keys(), "status": status}))
    lines = call("compare", "mine.toml", "--dry-run", "--out", "out").stdout.splitlines()
    assert lines[:3] == [f"{FIRST}  completed", f"{SECOND}  failed", "full/fedsa/lr0.001-seed0"]
    assert lines[-1] == f"24 cells, 1 completed and 1 failed in {tmp_path / 'out'}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "mine.toml", "--slots", "none at all"], "--slots 'none at all': expected a number from 1"),
        (["compare", "mine.toml", "--slots", "0"], "--slots '0': expected a number from 1"),
        (["compare", "none.toml"], "none.toml: no such file"),
        (["compare", "mine.toml", "-c", "train.stpes=1"], "did you mean 'train.steps'"),
        (["report", "nowhere"], "nowhere: no run here, result.json is missing"),
    ],
)
def test_a_wrong_word_is_one_sentence(call, tmp_path: Path, words: list[str], says: str) -> None:
    done = call(*words)
    assert done.exit_code == 1
    assert isinstance(done.exception, FedLoraError)  # which the command line prints as its sentence alone
    assert says in str(done.exception)
    assert not (tmp_path / "runs").exists()
