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
        str,
        typer.Argument(
            metavar="GRID", help="TOML file with strategies, learning rates, seeds and scenarios, or a preset."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("-c", "--config", metavar="KEY=VALUE", help="Set one configuration key; may be repeated."),
    ] = None,
    *,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results; default: runs/compare/<name>.")
    ] = None,
    slots: Annotated[
        str,
        typer.Option(
            help="Number of cells that run at the same time and share the cores, or devices such as cuda:0,cuda:1 for "
            "one cell each."
        ),
    ] = "1",
    retry: Annotated[bool, typer.Option("--retry", help="Also run the cells again that failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the grid and list its cells; run none of them.")
    ] = False,
    plan: Annotated[
        float | None,
        typer.Option(
            metavar="DIFFERENCE",
            help="Only say how many seeds would show a difference of this size, by the cells that are finished; run "
            "none.",
        ),
    ] = None,
) -> None:
    """Compare strategies: run each of them with the same learning rates, seeds and scenarios.

    One such run is called a cell, and leaves one JSON file. Finished cells are never run again: the same command
    continues where it was stopped, and a grid with new entries runs only the new cells. When a cell fails, this is
    recorded, and the other cells run all the same.

    Examples:

      fedlora compare compare-quick

      fedlora compare configs/compare-sentiment.toml --slots 2

      fedlora compare mine.toml --slots cuda:0,cuda:1 --out results/mine

      fedlora compare mine.toml --plan 0.01

      fedlora report runs/compare/sentiment
    """
    from fedlora.simulations.comparison import compare as comparison  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison import grid as grids  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison import race  # pyright: ignore[reportMissingImports]

    planned = grids.load(find_preset(grid), find_preset, overrides or [])
    places = comparison.slots_of(slots)
    folder = (to or Path("runs") / "compare" / planned.name).expanduser().resolve()
    if dry_run:
        known = comparison.finished(planned, folder)
        ahead = race.plan(planned, known)
        due = {cell.path for cell in ahead.due}
        for path in [cell.path for cell in planned.cells if cell.path in known or cell.path in due]:
            status = f"  {known[path]['status']}" if path in known else ""
            out.print(f"{path}{status}", soft_wrap=True, markup=False)
        failures = sum(cell["status"] == "failed" for cell in known.values())
        said = f"{len(known) - failures} completed and {failures} failed in {folder}"
        later = f", at most {ahead.later} more when these have ended" if ahead.later else ""
        out.print(f"{len(known) + len(due)} cells{later}, {said}", soft_wrap=True, markup=False)
        return
    from fedlora.simulations.comparison.ranking import rank  # pyright: ignore[reportMissingImports]

    if plan is not None:
        from fedlora.simulations.comparison.planning import needs, plan_table  # pyright: ignore[reportMissingImports]

        known = comparison.finished(planned, folder)
        found = needs(rank(list(known.values()), planned.metric, planned.reference), plan)
        out.print(plan_table(found, plan, planned.metric, planned.reference))
        return
    quiet()
    from fedlora.simulations.comparison.checks import check_scenarios  # pyright: ignore[reportMissingImports]
    from fedlora.simulations.comparison.standing import StandingDisplay, ranking_table  # pyright: ignore[reportMissingImports]

    check_scenarios(planned, [slot.device for slot in places if slot.device])
    display = StandingDisplay(out)
    with processes.stopped_by_signals() as told:
        try:
            with display.shown():
                ended = comparison.run(planned, folder, places, retry=retry, show=display)
        except KeyboardInterrupt:
            err.print(
                f"[yellow]interrupted[/yellow]; finished cells are in {folder}; the same command runs the others",
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
    out.print(f"report:  fedlora report {folder}", soft_wrap=True)
    if len(failed) == len(ended.done):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a comparison, or a run by its name or folder.")
    ],
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the page; default: DIR/report.")
    ] = None,
) -> None:
    """Make an HTML page about a comparison or a run.

    The page opens without a network. Its figures and tables are also written as files of their own.

    Examples:

      fedlora report runs/compare/sentiment

      fedlora report quickstart
    """
    from fedlora.simulations.report import write  # pyright: ignore[reportMissingImports]

    path = write(folder, to, say=lambda line: err.print(line, style="dim", soft_wrap=True, markup=False))
    out.print(f"open {path}", soft_wrap=True)
