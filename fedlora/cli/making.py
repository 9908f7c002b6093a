"""The commands that make an adapter from others: merge, migrate, generate, recycle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedlora import config as configuration
from fedlora.results.runs import adapter_folder

from .adapters import check_shared
from .shared import Overrides, app, err, load, out, quiet

Adapters = Annotated[
    list[Path],
    typer.Option(help="A run, by its name or folder, or the folder of a PEFT checkpoint; may be repeated."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new or empty.")]


@app.command()
def merge(
    folder: Out,
    adapter: Adapters,
    task: Annotated[str, typer.Option("--for", metavar="TEXT", help="Describes the new task.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Describes an adapter's task: one for each --adapter, in their order. Default: the name, the data and "
            "the task of its run.",
        ),
    ] = None,
    *,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Number of adapters that are merged.")] = 4,
    temperature: Annotated[
        float, typer.Option(metavar="TAU", help="Small ones leave the most similar adapter alone.")
    ] = 0.1,
    rank: Annotated[
        int, typer.Option(min=0, help="Largest rank of the result; 0: the sum of the ranks, and nothing is lost.")
    ] = 0,
    encoder: Annotated[
        str, typer.Option(metavar="MODEL", help="Model that turns the texts into vectors, as model.name.")
    ] = "minilm-l6",
) -> None:
    """Merge the adapters whose tasks are most like a new one, as a start for it (experimental).

    The weights are softmax(cosine / TAU) over the K most similar texts. The result is a PEFT checkpoint. A run starts
    from it with lora.init = given.

    Examples:

      fedlora merge start --adapter reviews --text "ratings of films" --adapter news --text "tone of editorials"
      --for "opinions on books"

      fedlora run sentiment -c lora.init=given -c lora.init-options=adapter=start
    """
    quiet()
    from fedlora.trained.merged import merge_by_text

    adapters = [adapter_folder(each) for each in adapter]
    for each in adapters:
        check_shared(each)
    experts = merge_by_text(
        adapters, text or [], task, folder, top=top, temperature=temperature, rank=rank, encoder=encoder
    )
    table = Table(title=f"most like: {task}")
    table.add_column("adapter", overflow="fold")
    table.add_column("its task", overflow="fold")
    table.add_column("cosine", justify="right")
    table.add_column("weight", justify="right")
    for expert in experts:
        table.add_row(str(expert.adapter), expert.text, f"{expert.cosine:.4f}", f"{expert.weight:.4f}")
    out.print(table)
    out.print(f"{folder}: written; start a run from it with lora.init = given", soft_wrap=True)


@app.command()
def migrate(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for rows and run; it must be new or empty.")],
    adapter: Annotated[Path, typer.Option(help="A run, by its name or folder, or an adapter's folder.")],
    to: Annotated[str, typer.Option("--to", metavar="MODEL", help="The other base model, as model.name.")],
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="TOML file or preset with the real rows; default: the adapter's run."),
    ] = None,
    overrides: Overrides = None,
    *,
    rows: Annotated[int, typer.Option(metavar="N", help="Number of prompts that are made up.")] = 96,
    keep: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of them that is kept: those most like real prompts.")
    ] = 0.5,
    seeds: Annotated[int, typer.Option(metavar="N", help="Number of real prompts shown as examples at a time.")] = 5,
    encoder: Annotated[
        str, typer.Option(metavar="MODEL", help="What the discriminator sees prompts by, as model.name.")
    ] = "minilm-l6",
) -> None:
    """Move an adapter to another base model, by rows that the adapter's own model makes up (experimental).

    OUT gets rows.jsonl, migration.json and student/, an ordinary run on these rows whose adapter is the result. -c sets
    keys of that run.

    Examples:

      fedlora migrate moved --adapter quickstart --to ./other-model

      fedlora migrate moved --adapter quickstart --to ./other-model --rows 200 -c train.epochs=5 -c lora.rank=16
    """
    quiet()
    from fedlora.results.display import RunDisplay
    from fedlora.simulations.migration import migrate as move  # pyright: ignore[reportMissingImports]
    from fedlora.trained import export as exporting

    source = exporting.find(adapter)
    check_shared(source.adapter)
    settings = load(config, None) if config is not None else source.config
    configuration.parse_overrides(overrides or [])

    def tell(what: str, done: int, total: int) -> None:
        out.print(f"{what}: {done} of {total}", soft_wrap=True)

    from fedlora.common.events import listen

    with RunDisplay(out) as display, listen(display):
        done = move(
            source,
            settings,
            to,
            folder,
            overrides or [],
            count=rows,
            keep=keep,
            seeds=seeds,
            encoder=encoder,
            on_done=tell,
        )
    out.print(
        f"{done.made.sampled} prompts made up; told from real ones in {done.made.told_apart:.0%} of cases (50 % is "
        f"chance); {len(done.made.rows)} kept and answered",
        soft_wrap=True,
    )
    table = Table(title="agreement with the source on held-out rows of these")
    for heading in ("", "tokens", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, metrics in ((f"{to} alone", done.before), ("with the new adapter", done.after)):
        table.add_row(label, f"{metrics['accuracy']:.4f}", f"{metrics['loss']:.4f}")
    out.print(table)
    out.print(f"{done.folder}: the run whose adapter it is", soft_wrap=True)


@app.command()
def generate(
    folder: Out,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file or preset with the rows of the new task.")],
    adapter: Adapters,
    overrides: Overrides = None,
    *,
    rank: Annotated[int, typer.Option(help="Rank of every module; larger adapters are cut to it.")] = 8,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the generator's training.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generator.")] = 0,
) -> None:
    """Generate an adapter for a new task from adapters of other tasks, without training on its rows (experimental).

    A small conditional autoencoder learns the adapters by what their base model makes of their rows. It needs several
    adapters, of several tasks; with few of them, the result is little more than an interpolation.

    Examples:

      fedlora generate made sentiment -c data.parts="3 of 4" -c federation.clients=1 --adapter a --adapter b --adapter c
    """
    quiet()
    from fedlora.trained.generated import generate as draw

    adapters = [adapter_folder(each) for each in adapter]
    for each in adapters:
        check_shared(each)
    found = draw(adapters, load(config, overrides), folder, rank=rank, steps=steps, seed=seed)
    table = Table(title="the generated adapter beside those that it was learned from")
    for heading in ("adapter", "cosine of the updates", "cosine of the tasks"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right", overflow="fold")
    for each in found:
        table.add_row(str(each.adapter), f"{each.cosine:.4f}", f"{each.task:.4f}")
    out.print(table)
    out.print(f"{folder}: written", soft_wrap=True)


@app.command()
def recycle(
    folder: Out,
    adapter: Adapters,
    *,
    accept_inversion: Annotated[
        bool, typer.Option("--accept-inversion", help="Go on, although the inputs found may resemble clients' rows.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of every module of the new adapter.")] = 8,
    rows: Annotated[int, typer.Option(metavar="N", help="Number of inputs for each class and adapter.")] = 16,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each input.")] = 16,
    inversion_steps: Annotated[int, typer.Option(metavar="N", help="Steps of the search for inputs.")] = 200,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the training, an episode each.")] = 200,
    shots: Annotated[
        int, typer.Option(metavar="N", help="Inputs of each class in the support, and among the queries.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search and the training.")] = 0,
) -> None:
    """Distil the adapters of several classifiers into one, without rows (experimental; inverts what clients learned).

    For each adapter, inputs are found to which it gives chosen classes. One new adapter is trained on them by distances
    to the means of the classes. These inputs may resemble the clients' rows, so that nothing is done without
    --accept-inversion.

    Examples:

      fedlora recycle one --adapter a --adapter b --adapter c --accept-inversion
    """
    quiet()
    from fedlora.trained.recycled import WARNING
    from fedlora.trained.recycled import recycle as distil

    adapters = [adapter_folder(each) for each in adapter]
    for each in adapters:
        check_shared(each)
    if accept_inversion:
        err.print(f"fedlora recycle: {WARNING}", soft_wrap=True)

    def tell(what: str, done: int, total: int) -> None:
        out.print(f"{what}: {done} of {total}", soft_wrap=True)

    done = distil(
        adapters,
        folder,
        accept_inversion=accept_inversion,
        rank=rank,
        rows=rows,
        tokens=tokens,
        inversion_steps=inversion_steps,
        steps=steps,
        shots=shots,
        seed=seed,
        on_done=tell,
    )
    table = Table(title="inputs found that get their class")
    for heading in ("adapter", "inputs", "of"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right", overflow="fold")
    for path, kept in done.kept.items():
        table.add_row(str(path), str(kept), str(done.tried))
    out.print(table)
    out.print(f"prototypical loss: {done.first:.4f} at first, {done.last:.4f} at last", soft_wrap=True)
    out.print(f"{folder}: written", soft_wrap=True)
