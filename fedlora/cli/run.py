"""The command that runs a federation."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedlora import config as configuration
from fedlora.common import processes
from fedlora.common.errors import ConfigError, FedLoraError

from .shared import Authority, Insecure, Overrides, app, err, kept_by_clients, load, out, quiet


class Engine(StrEnum):
    """The engines that can run the clients."""

    local = "local"
    flower = "flower"


@app.command()
def run(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A TOML file, or the name of a preset such as quickstart."),
    ] = None,
    overrides: Overrides = None,
    engine: Annotated[
        Engine, typer.Option(help="local: all clients in this process. flower: Flower's simulation engine (Ray).")
    ] = Engine.local,
    *,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Continue a run after its last complete round; RUN is its folder, or its name for the latest of that "
            "name.",
        ),
    ] = None,
    from_round: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --resume: continue from the server's state after round N."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --engine flower: number of clients that train at the same time, each with its own base model; "
            "default: 1.",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Run on the nodes connected to this server (fedlora server), not on this machine."
        ),
    ] = None,
    ca: Authority = None,
    insecure: Insecure = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="With --engine local: show how the first round's time was spent, and write a trace of it."
        ),
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With --engine local: divide the clients among these devices, such as cuda:0,cuda:1; auto: all GPUs.",
        ),
    ] = None,
) -> None:
    """Run a federation and save its adapter.

    Without --server, clients are simulated on this machine.

    Results go to runs/<name>/<time>/: result.json (everything measured), adapter/ (the trained adapter as a PEFT
    checkpoint), tensorboard/, and state/, from which --resume continues a run that was interrupted or died.

    Examples:

      fedlora run quickstart

      fedlora run --resume quickstart

      fedlora run --resume runs/quickstart/20260101-120000 --from-round 2

      fedlora run configs/quickstart.toml -c strategy.name=lora-fair -c federation.rounds=5

      fedlora run sentiment --devices cuda:0,cuda:1

      fedlora run sentiment --engine flower

      fedlora run federation.toml --server fed.example.org:9092 --ca certs/ca.crt
    """
    _check_options(config, resume, engine, server=server, profile=profile, devices=devices, at_once=at_once)
    if from_round is not None and resume is None:
        raise ConfigError("run: --from-round works only in a run that is resumed; name its folder with --resume")
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks on stderr; read when torch is loaded
    settings = load(config, overrides) if config is not None else _resumed(resume, overrides, from_round)
    _check_names(settings, here=server is None)
    places: tuple[str, ...] = ()
    if devices is not None:
        from fedlora.simulations.engines.devices import devices_of  # pyright: ignore[reportMissingImports]

        places = devices_of(devices)
    from fedlora.results.display import RunDisplay, cut_line, last_values_table, result_table
    from fedlora.results.profile import Profiler, profiled, show
    from fedlora.results.run_folder import folder_of, stamp

    settings = stamp(settings)
    folder = folder_of(settings)
    quiet()
    federation = settings.federation
    out.print(
        f"{settings.run.name}: {federation.clients} clients, {federation.rounds} round{'s' * (federation.rounds > 1)}, "
        f"{settings.strategy.name} on {settings.model.name} ({settings.model.quantization})",
        soft_wrap=True,
        markup=False,
    )
    watcher: Profiler | None = None
    with _results_after_an_error(folder), _interruptible(folder, server), RunDisplay(out) as display:
        if server is not None:
            from fedlora.common.events import listen
            from fedlora.deployment import connection

            with listen(display):
                connection.run(settings, server, ca, insecure)
        else:
            from fedlora.simulations.run import run as run_here  # pyright: ignore[reportMissingImports]

            with profiled(settings, folder) if profile else nullcontext() as watcher:
                run_here(settings, listen=display, engine=engine.value, devices=places, at_once=at_once)
    if not (folder / "result.json").is_file():
        out.print(f"completed; the record and the adapter are on the server's machine, in {folder}", soft_wrap=True)
        return
    out.print(result_table(folder))
    if (by_value := last_values_table(folder)) is not None:
        out.print(by_value)
    if said := cut_line(folder):
        out.print(said, style="yellow", soft_wrap=True, markup=False)
    if watcher is not None:
        show(watcher, out)
    out.print(f"adapter: {folder / 'adapter'}", soft_wrap=True)
    if kept := kept_by_clients(settings):
        out.print(
            f"{kept} stays on each client, and without it the adapter is nobody's model; for one client's adapter:"
        )
        out.print(f"         fedlora export {folder} OUT --client 0", soft_wrap=True)
    else:
        out.print(f"try it:  fedlora evaluate --adapter {folder / 'adapter'}", soft_wrap=True)


def _resumed(folder: Path | None, overrides: list[str] | None, from_round: int | None) -> configuration.Config:
    from fedlora.results.run_folder import resumed

    assert folder is not None
    return resumed(folder, overrides or [], -1 if from_round is None else from_round)


def _check_names(settings: configuration.Config, *, here: bool) -> None:
    """Refuse a task or a strategy that does not exist or does not fit the run, before anything is loaded.

    Args:
        settings: the run's configuration.
        here: whether the run is on this machine. A server may have a user's own task that this machine lacks, and its
            nodes choose their own ranks, which the server checks when it knows them.
    """
    from fedlora.tasks.registry import check_task, is_own

    if here or not is_own(settings.model):
        check_task(settings)
    if here:
        from fedlora.strategies.configured import check_ranks  # pyright: ignore[reportMissingImports]

        check_ranks(settings)


def _check_options(
    config: str | None,
    resume: Path | None,
    engine: Engine,
    *,
    server: str | None,
    profile: bool,
    devices: str | None,
    at_once: int | None,
) -> None:
    """Raise ConfigError for options of `run` that do not go together."""
    if (config is None) == (resume is None):
        raise ConfigError("run: name either a CONFIG, such as quickstart, or the folder of a run with --resume")
    if at_once is not None and (server is not None or engine is not Engine.flower):
        raise ConfigError(
            "run: --at-once needs --engine flower; with the local engine, set train.clients-at-once, the number of "
            "clients that train as one batch"
        )
    if profile and (server is not None or engine is not Engine.local):
        where = "--server" if server is not None else f"--engine {engine.value}"
        raise ConfigError(
            f"run: --profile measures this process, but with {where} clients train in others; leave out one of the two"
        )
    if devices is not None and (profile or server is not None or engine is not Engine.local):
        why = (
            "--profile measures this process alone"
            if profile
            else "--server and --engine flower place the clients themselves"
        )
        raise ConfigError(
            f"run: --devices trains the local engine's clients in other processes, but {why}; leave out one of the two"
        )


@contextmanager
def _results_after_an_error(folder: Path) -> Iterator[None]:
    """Around a run: when it ends with an error, show the results of the rounds before, then raise the error."""
    try:
        yield
    except FedLoraError as error:
        from fedlora.results.display import result_table
        from fedlora.results.run_folder import ended_by

        if (folder / "adapter").is_dir() and ended_by(folder, error):
            out.print(result_table(folder))
            out.print(f"adapter: {folder / 'adapter'}", soft_wrap=True)
        raise


@contextmanager
def _interruptible(folder: Path, server: str | None) -> Iterator[None]:
    """Around a run: end it in order on Ctrl-C, SIGTERM or a closed terminal, and say how to continue it."""
    with processes.stopped_by_signals() as told:
        try:
            yield
        except KeyboardInterrupt:
            if folder.is_dir():
                err.print(f"[yellow]interrupted[/yellow]; what was finished is in {folder}", soft_wrap=True)
                err.print(f"continue it: fedlora run --resume {folder}", soft_wrap=True)
            else:
                end = "before the run began" if server is None else f"and stopped on the server at {server}"
                err.print(f"[yellow]interrupted[/yellow] {end}", soft_wrap=True)
            raise typer.Exit(128 + (told.number or signal.SIGINT)) from None
