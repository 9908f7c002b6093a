"""The commands on a federation's machines: certs, server, node, worker, key, register, unregister, nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedlora import config as configuration
from fedlora.common.errors import ConfigError

from .shared import Authority, Insecure, app, err, load, out, quiet

Server = Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")]
_HERE = "127.0.0.1:9092"

Metrics = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Answer Prometheus at http://127.0.0.1:PORT/metrics; needs fedlora[metrics]."),
]

State = Annotated[
    Path | None, typer.Option(help="Folder for logs and state; default: in the user's own, by port or key.")
]


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
    from fedlora.deployment.server import serve

    folder = state or _state_folder("server", str(port))
    with _told_to_stop(insecure):
        serve(
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
    from fedlora.deployment.node import data_file, join

    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())
    given = {
        "data": data_file(data) if data else None,
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

        for line in looked_at(load(of_run, None) if of_run else configuration.Config(), settings):
            out.print(line, soft_wrap=True, markup=False)
        return
    folder = state or _state_folder("node", key.stem if key else str(partition_ids or partition_id or 0))
    with _told_to_stop(insecure):
        join(
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
def key(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The private key; PATH.pub beside it is the public one.")
    ],
) -> None:
    """Make a node's own key pair, on the node: the private key never leaves it; nothing is overwritten.

    Send PATH.pub to whoever runs the server, who registers it, and read its fingerprint to them over the telephone.

    Examples:

      fedlora key keys/north
    """
    from fedlora.deployment import certificates

    made = certificates.make_key(path)
    out.print(f"{path}: the private key, which stays here", soft_wrap=True)
    out.print(f"{path}.pub: {made}; let the server know it: fedlora register {path.name}.pub", soft_wrap=True)


@app.command()
def register(
    keys: Annotated[list[Path], typer.Argument(metavar="KEY.pub...", help="Public keys of nodes.")],
    server: Server = _HERE,
    ca: Authority = None,
    *,
    replaces: Annotated[
        str, typer.Option(metavar="NODE", help="A node whose key is taken away; the new key gets its name and clients.")
    ] = "",
) -> None:
    """Let a server know its nodes by their public keys; each is called by the name of its file.

    Examples:

      fedlora register north.pub south.pub --server fed.example.org:9092 --ca certs/ca.crt

      fedlora register new.pub --replaces north --server fed.example.org:9092 --ca certs/ca.crt
    """
    from fedlora.deployment import nodes

    for line in nodes.register(keys, server, ca, replaces):
        out.print(line, soft_wrap=True, markup=False)


@app.command()
def unregister(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NODE...", help="Names, numbers or fingerprints of fedlora nodes, or .pub files."),
    ],
    server: Server = _HERE,
    ca: Authority = None,
) -> None:
    """Take nodes out of a federation; their keys are never taken again."""
    from fedlora.deployment import nodes

    for line in nodes.unregister(names, server, ca):
        out.print(line, soft_wrap=True, markup=False)


@app.command(name="nodes")
def list_nodes(server: Server = _HERE, ca: Authority = None) -> None:
    """List the nodes of a server: name, key, state, and when it last came or went."""
    from fedlora.deployment import nodes

    table = Table()
    for title in ("name", "key", "state", "last seen"):
        table.add_column(title, overflow="fold")
    for node in nodes.known(server, ca):
        style = {"online": "green", nodes.GONE: "red"}.get(node.state, "")
        seen = "" if node.seen is None else f"{node.seen:%Y-%m-%d %H:%M:%S} UTC"
        state = f"[{style}]{node.state}[/]" if style else node.state
        table.add_row(escape(node.name or str(node.number)), node.key, state, seen)
    out.print(table)


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
