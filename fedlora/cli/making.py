"""The commands that make an adapter from others: merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedlora.results.runs import adapter_folder

from .adapters import check_shared
from .shared import app, out, quiet

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
