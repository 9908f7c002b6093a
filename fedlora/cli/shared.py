"""What all commands share: the app, the consoles, options, and how a configuration is found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora import config as configuration
from fedlora.common import processes
from fedlora.common.errors import StrategyError

processes.share_cores()  # before any command loads torch
app = typer.Typer(
    name="fedlora",
    help="Federated LoRA fine-tuning: clients of unequal ranks share one quantized model, their data stays with them.",
    epilog="Start with: fedlora run quickstart. Any command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

flags: set[str] = set()  # --debug, where it was given

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-c", "--config", metavar="KEY=VALUE", help="Change one key; repeat for more. All keys: fedlora keys."
    ),
]

Preset = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a preset such as quickstart.")
]
Authority = Annotated[
    Path | None, typer.Option("--ca", help="Certificate of the authority behind the server: ca.crt of fedlora certs.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Neither TLS nor node authentication: for tests on one machine.")
]


def load(config: str, overrides: list[str] | None) -> configuration.Config:
    """A preset or a TOML file, with overrides."""
    return configuration.load(configuration.find_preset(config), overrides or [])


def quiet() -> None:
    """Keep libraries from talking over the product's own output."""
    import logging
    import warnings

    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from fedlora.results.display import ConsoleLog

    log = logging.getLogger("fedlora")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(ConsoleLog(out))
    log.propagate = False
    if "--debug" not in flags:
        warnings.filterwarnings("ignore")
        logging.getLogger("flwr").setLevel(logging.ERROR)


def kept_by_clients(strategy: str) -> str:
    """The factors that stay on the clients with the strategy of this name, such as "B"; mostly none."""
    from fedlora.strategies import registry  # pyright: ignore[reportMissingImports]

    try:
        return " and ".join(sorted(registry.STRATEGIES.resolve(strategy).personal))
    except StrategyError:  # of somebody's own module, which is not here
        return ""
