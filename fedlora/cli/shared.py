"""The parts that all commands share: the app, the consoles, common options, and how a configuration is found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora import config as configuration
from fedlora.common import processes
from fedlora.common.errors import ConfigError, StrategyError

processes.share_cores()  # before any command loads torch
app = typer.Typer(
    name="fedlora",
    help="Fine-tune one language model on the data of many owners, with LoRA. The data never leaves its owner.",
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
        "-c",
        "--config",
        metavar="KEY=VALUE",
        help="Set one configuration key; may be repeated. fedlora keys lists all keys.",
    ),
]

Preset = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a preset such as quickstart.")
]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca", help="Certificate by which the server is recognized: ca.crt, which fedlora certs wrote for it."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Use neither TLS nor node authentication; only for tests on one machine.")
]


def load(config: str, overrides: list[str] | None) -> configuration.Config:
    """The configuration of a preset or a TOML file, with overrides."""
    return configuration.load(configuration.find_preset(config), overrides or [])


def quiet() -> None:
    """Keep other libraries' log lines and warnings out of the command's output."""
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


def kept_by_clients(config: configuration.Config) -> str:
    """What a run's strategy and adapter kind keep on the clients, such as "B"; an empty text for most runs."""
    from fedlora.adapters.kinds.registry import KINDS
    from fedlora.strategies import registry  # pyright: ignore[reportMissingImports]

    try:
        personal = registry.STRATEGIES.resolve(config.strategy.name).personal
        return " and ".join(sorted(personal | KINDS.make(config.lora.kind, config.lora.kind_options).kept))
    except (StrategyError, ConfigError):  # a user's own, whose module is not on this machine
        return ""
