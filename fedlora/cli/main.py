"""The `fedlora` command. Heavy libraries load inside the commands that need them."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated

import typer
from rich.markup import escape

from fedlora import __version__
from fedlora.common.errors import FedLoraError, of_the_disk

from .shared import app, err, flags, out

for _group in (
    "run",
    "adapters",
    "making",
    "experiments",
    "inspect",
    "nodes",
):  # in the order in which help lists their commands
    import_module(f"{__package__}.{_group}")


def _say_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune one language model on the data of many owners, with LoRA. The data never leaves its owner."""


def main() -> None:
    """Entry point. Every error ends with one sentence and a non-zero exit code; --debug shows its traceback too."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        flags.add("--debug")
    sys.path.append(os.getcwd())  # so that a user's own strategy, package.module:Class, is found
    try:
        app()
    except FedLoraError as error:
        if flags:
            traceback.print_exc()
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if said := of_the_disk(error):
            if flags:
                traceback.print_exc()
            err.print(f"[red]error:[/red] {escape(said)}", soft_wrap=True)
            sys.exit(1)
        if flags:
            raise
        err.print(
            f"[red]internal error:[/red] {type(error).__name__}: {escape(str(error))}\n"
            "Run again with --debug for the traceback, and please report it.",
            soft_wrap=True,
        )
        sys.exit(70)


if __name__ == "__main__":
    main()
