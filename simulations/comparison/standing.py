"""Shows a comparison in a terminal: finished cells, the cell in each slot, and the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .compare import Standing
from .ranking import Ranking, lower_is_better


class StandingDisplay:
    """Shows a `Standing` whenever it is called: a live table on a terminal, a line for each new cell elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()
        self._dropped: set[tuple[str, str]] = set()
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[StandingDisplay]:
        """Within the block, show the table on a terminal."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield self

    def __call__(self, standing: Standing) -> None:
        """Show the present progress."""
        if self._live is not None:
            self._live.update(overview(standing), refresh=True)
            return
        if not self._told:
            self._told = set(standing.done) | {""}
            self._dropped = set(standing.dropped)
            self._console.print(f"{len(standing.done)} of {standing.total} cells are finished already")
        for path in [path for path in standing.done if path not in self._told]:
            self._told.add(path)
            cell = standing.done[path]
            value = _validation(cell, standing.grid.metric)
            said = f"{standing.grid.metric} {_number(value) or 'not finite'}"
            said = f"failed: {cell['error']}" if cell["status"] == "failed" else said
            self._console.print(
                f"{len(standing.done)}/{standing.total}  {path}  {said}  {cell['seconds']:.0f} s, {_left(standing)}",
                soft_wrap=True,
                markup=False,
            )
        for scenario, label in standing.dropped.keys() - self._dropped:
            self._dropped.add((scenario, label))
            seed = standing.dropped[scenario, label]
            self._console.print(f"{scenario}/{label} drops out after seed {seed}: worse beyond doubt (validation)")


def overview(standing: Standing) -> RenderableType:
    """Finished cells and best validation metrics by strategy and scenario, as a table; running cells; the time left."""
    grid = standing.grid
    table = Table(title=f"{grid.name}: {len(standing.done)} of {standing.total} cells; best {grid.metric} (validation)")
    table.add_column("")
    for scenario in grid.scenarios:
        table.add_column(scenario, justify="right")
    for label in (*grid.labels, *grid.baselines):
        table.add_row(label, *[_square(standing, scenario, label) for scenario in grid.scenarios])
    lines: list[RenderableType] = [table]
    for number, (cell, began, work) in sorted(standing.running.items()):
        device = standing.slots[number].device or "slot"
        seconds = time.monotonic() - began
        lines.append(Text(f"{device} {number + 1}: {cell.path}  {_round(work)}  {seconds:.0f} s", style="dim"))
    return Group(*lines, Text(_left(standing)))


def ranking_table(ranking: Ranking) -> Table:
    """A table of the results in one scenario, on test rows."""
    table = Table(title=f"{ranking.scenario}: {ranking.metric} on test rows, at the learning rate chosen by validation")
    for title in ("rank", "", "lr", "mean", "sd", f"− {ranking.reference}", "p (Holm)"):
        table.add_column(title, justify="left" if not title else "right")
    for row in ranking.rows:
        edge = " *" if row.choice.edge in ("lowest", "highest") else ""
        table.add_row(
            "" if row.rank is None else str(row.rank),
            row.label,
            "" if row.choice.lr is None else f"{row.choice.lr:g}{edge}",
            _number(row.mean),
            _number(row.sd),
            "" if row.difference is None else f"{row.difference:+.4f}",
            "" if row.p_holm is None else f"{row.p_holm:.3f}",
        )
    edges = any(row.choice.edge in ("lowest", "highest") for row in ranking.rows)
    notes = [*ranking.notes, *(["* the best rate is at the end of the sweep: add rates"] if edges else [])]
    table.caption = "\n".join(notes)
    return table


def _square(standing: Standing, scenario: str, label: str) -> str:
    metric = standing.grid.metric
    cells = [cell for cell in standing.grid.cells if (cell.scenario, cell.label) == (scenario, label)]
    done = [standing.done[cell.path] for cell in cells if cell.path in standing.done]
    failed = sum(cell["status"] == "failed" for cell in done)
    means = []
    for lr in {cell["lr"] for cell in done}:
        values = [value for cell in done if cell["lr"] == lr and (value := _validation(cell, metric)) is not None]
        means += [fmean(values)] if values else []
    best = f"{(min if lower_is_better(metric) else max)(means):.4f}  " if means else ""
    counted = f"{len(done)}/{len(cells)}" if standing.grid.race == "none" else f"{len(done)}"
    out = ", dropped" if (scenario, label) in standing.dropped else ""
    return f"{best}{counted}{f', {failed} failed' if failed else ''}{out}"


def _validation(cell: dict[str, object], metric: str) -> float | None:
    scores = cell.get("scores")
    return scores["validation"].get(metric) if isinstance(scores, dict) else None


def _round(work: Path) -> str:
    """The progress of a cell's run, from its record."""
    records = sorted(work.glob("run/*/result.json"), key=lambda path: path.stat().st_mtime)
    try:
        data = json.loads(records[-1].read_text(encoding="utf-8"))
        return f"round {len(data['rounds'])}/{data['config']['federation.rounds']}"
    except (IndexError, OSError, ValueError, KeyError):
        return "starting"


def _left(standing: Standing) -> str:
    seconds = standing.seconds_left
    if seconds is None:
        return f"{standing.remaining} cells to go"
    return f"{standing.remaining} cells to go, about {seconds / 60:.0f} min" if standing.remaining else "all done"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
