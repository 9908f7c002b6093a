"""The commands on experiments: compare, report."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from fedlora.common import processes
from fedlora.config import find_preset

from .shared import app, err, out, quiet


@app.command()
def compare(
    grid: Annotated[
        str, typer.Argument(metavar="GRID", help="A TOML file of strategies, rates, seeds and scenarios, or a preset.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--config", metavar="KEY=VALUE", help="Change one key of the settings; repeat for more."),
    ] = None,
    *,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results; default: runs/compare/<name>.")
    ] = None,
    slots: Annotated[
        str, typer.Option(help="Cells at a time, which share the cores: a number, or devices such as cuda:0,cuda:1.")
    ] = "1",
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the grid and list its cells; run nothing.")] = False,
) -> None:
    """Compare strategies: the same learning rates, seeds and scenarios for each, one JSON file per cell.

    Finished cells are never run again: the same command goes on where it was stopped, and a grid that grows runs what
    is new. A cell that fails is recorded, and the rest go on.

    Examples:

      fedlora compare compare-quick

      fedlora compare configs/compare-sentiment.toml --slots 2

      fedlora compare mine.toml --slots cuda:0,cuda:1 --out results/mine

      fedlora report runs/compare/sentiment
    """
    from fedlora.simulations.comparison import compare as comparison  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison import grid as grids  # pyright: ignore[reportMissingImports]

    planned = grids.load(find_preset(grid), find_preset, overrides or [])
    places = comparison.slots_of(slots)
    folder = (to or Path("runs") / "compare" / planned.name).expanduser().resolve()
    if dry_run:
        known = comparison.finished(planned, folder)
        for cell in planned.cells:
            status = f"  {known[cell.path]['status']}" if cell.path in known else ""
            out.print(f"{cell.path}{status}", soft_wrap=True, markup=False)
        failures = sum(cell["status"] == "failed" for cell in known.values())
        said = f"{len(known) - failures} completed and {failures} failed in {folder}"
        out.print(f"{len(planned.cells)} cells, {said}", soft_wrap=True, markup=False)
        return
    quiet()
    from fedlora.simulations.comparison.checks import check_scenarios  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison.ranking import rank  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison.standing import StandingDisplay, ranking_table  # pyright: ignore[reportMissingImports]

    check_scenarios(planned, [slot.device for slot in places if slot.device])
    display = StandingDisplay(out)
    with processes.stopped_by_signals() as told:
        try:
            with display.shown():
                ended = comparison.run(planned, folder, places, retry=retry, show=display)
        except KeyboardInterrupt:
            err.print(
                f"[yellow]interrupted[/yellow]; finished cells are in {folder}; the same command goes on",
                soft_wrap=True,
            )
            raise typer.Exit(128 + (told.number or signal.SIGINT)) from None
    failed = [path for path, cell in ended.done.items() if cell["status"] == "failed"]
    for ranking in rank(list(ended.done.values()), planned.metric, planned.reference):
        out.print(ranking_table(ranking))
    for path in failed:
        out.print(f"failed: {path}: {ended.done[path].get('error')}", style="yellow", soft_wrap=True, markup=False)
    if failed:
        out.print(f"{len(failed)} cells failed; run them again with --retry", soft_wrap=True)
    out.print(f"results: {folder}", soft_wrap=True)
    out.print(f"look:    fedlora report {folder}", soft_wrap=True)
    if len(failed) == len(ended.done):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A comparison's folder, or a run by its name or folder.")
    ],
    to: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to; default: DIR/report.")] = None,
) -> None:
    """Make one page of a comparison or a run, which opens without a network; figures and tables as files beside it.

    Examples:

      fedlora report runs/compare/sentiment

      fedlora report quickstart
    """
    from fedlora.simulations.report import write  # pyright: ignore[reportMissingImports]

    path = write(folder, to, say=lambda line: err.print(line, style="dim", soft_wrap=True, markup=False))
    out.print(f"open {path}", soft_wrap=True)
