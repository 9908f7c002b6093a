"""The commands on experiments: compare, report, audit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from fedlora.common import processes
from fedlora.config import find_preset

from .adapters import check_shared
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
    samples: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Of a simulation on images, show the first N images of each client."),
    ] = 8,
) -> None:
    """Make an HTML page about a comparison or a run.

    The page opens without a network. Its figures and tables are also written as files of their own. Of a simulation on
    images, it shows some images of each client, which are read again from data.source; --samples 0 leaves them out.

    Examples:

      fedlora report runs/compare/sentiment

      fedlora report quickstart
    """
    from fedlora.simulations.report import write  # pyright: ignore[reportMissingImports]

    path = write(
        folder, to, say=lambda line: err.print(line, style="dim", soft_wrap=True, markup=False), samples=samples
    )
    out.print(f"open {path}", soft_wrap=True)


@app.command()
def audit(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs, by name or folder; the first one's report has all."),
    ],
    *,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Compare at most N training rows with as many other rows.")
    ] = 500,
    shadows: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Also repeat each run N times, each time on half of the compared rows, for a stronger attack; an even "
            "number.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the compared rows.")] = 0,
) -> None:
    """Measure how well an attacker tells a run's training rows from other rows (membership inference).

    The attacker sees the adapter and the losses of single rows. AUC is the probability that a training row looks more
    like one than another row does: 0.5 is guessing. Name a run with privacy.level and the same run without it to see
    what the noise does. audit.json in each run's folder has the results, and the report draws them.

    An audit finds leaks and proves nothing about their absence: other attacks may find more.

    Examples:

      fedlora audit quickstart

      fedlora audit plain private --rows 200 --shadows 4

      fedlora report plain
    """
    quiet()
    from rich.table import Table

    from fedlora.results.display import ScoringDisplay
    from fedlora.simulations import membership  # pyright: ignore[reportMissingImports]
    from fedlora.trained import export as exporting

    sources = [exporting.find(run) for run in runs]
    for source in sources:
        check_shared(source.adapter)
    found: list[membership.Audit] = []
    with ScoringDisplay(err) as display:
        for source in sources:
            found.append(membership.audit(source, rows, shadows, seed, display))
    membership.write(found)
    table = Table(title=f"membership inference on {len(found[0].members)} training rows and as many others")
    for heading in ("run", "epsilon", "score", "AUC (95 %)", "found at 1 % false alarms", "advantage"):
        table.add_column(heading, justify="left" if heading in ("run", "score") else "right", overflow="fold")
    for one in found:
        epsilon = f"{one.privacy['epsilon']:.2f}" if one.privacy else "no limit"
        for name, attack in one.attacks.items():
            low, high = attack.interval
            area = f"{attack.auc:.3f} ({low:.3f} to {high:.3f})"
            table.add_row(one.name, epsilon, name, area, f"{attack.caught:.1%}", f"{attack.advantage:.3f}")
    out.print(table)
    out.print(f"written: {', '.join(str(one.folder / membership.NAME) for one in found)}", soft_wrap=True)
    out.print(f"report:  fedlora report {found[0].folder}", soft_wrap=True)
