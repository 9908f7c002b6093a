"""The commands on a federation's machines: certs, server, node, edge, worker, key, register, unregister, nodes."""

from __future__ import annotations

import os
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

Server = Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of the server.")]
_HERE = "127.0.0.1:9092"

Metrics = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        help=r"Serve metrics for Prometheus at http://127.0.0.1:PORT/metrics; needs pip install 'fedlora\[metrics]'.",
    ),
]

State = Annotated[
    Path | None,
    typer.Option(help="Folder for logs and state; default: one in the user's state folder, named by the port or key."),
]


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files; made if it is missing.")],
    server_name: Annotated[
        list[str] | None, typer.Option(help="DNS name of the server; may be repeated. localhost is always included.")
    ] = None,
    ip: Annotated[
        list[str] | None, typer.Option(help="IP address of the server; may be repeated. 127.0.0.1 is always included.")
    ] = None,
    nodes: Annotated[
        str, typer.Option(help="Nodes to make key pairs for: a number, or names such as north,south.")
    ] = "",
    *,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew", help="Make only a new certificate for the server, signed by the authority that is in DIR."
        ),
    ] = False,
) -> None:
    """Make a certificate authority, the server's certificate, and key pairs for nodes.

    No file is overwritten. With --nodes alone, an existing folder gets more key pairs; it is safer to let each node
    make its own with fedlora key. Use --renew before the server's certificate expires, and then restart the server;
    nothing changes for the nodes.
    """
    from fedlora.deployment import certificates

    if renew and nodes:
        raise ConfigError("certs: --renew makes the server's certificate alone; add nodes in another command")
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
    certs: Annotated[Path | None, typer.Option(help="Folder with the files that fedlora certs wrote.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 also accepts nodes on other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on, for nodes and for fedlora run.")
    ] = 9092,
    state: State = None,
    database: Annotated[
        Path | None,
        typer.Option(help="Database of registered keys and of runs; default: superlink.db in the state folder."),
    ] = None,
    metrics_port: Metrics = None,
    insecure: Insecure = False,
) -> None:
    """Start a federation's server. It waits for nodes, and for fedlora run --server; Ctrl-C stops it."""
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
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the server (fedlora server).")
    ] = "127.0.0.1:9092",
    ca: Authority = None,
    key: Annotated[Path | None, typer.Option(help="This node's private key, which fedlora key made.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File, or folder of images, with this node's own rows; default: its share of data.source."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="LoRA rank that this node's hardware allows; default: the run's lora.ranks."),
    ] = None,
    partition_id: Annotated[
        int | None, typer.Option(min=0, help="This node's number as a client, from 0; default: the server gives one.")
    ] = None,
    partition_ids: Annotated[
        str | None,
        typer.Option(help="Numbers of several clients on this node, which train as one batch: 0-3, or 0,2,5."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device that computes: cpu, cuda:0, mps …; default: the run's model.device.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of the base model on this machine; default: the run's model.name.")
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="What all runs together may cost the privacy of this node's rows, at -c delta=… (1e-5); it then takes "
            "part only in runs with privacy.level = example.",
        ),
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(
            "-c", "--config", metavar="KEY=VALUE", help="Set one key of the node's own config; may be repeated."
        ),
    ] = None,
    state: State = None,
    worker: Annotated[
        bool, typer.Option(help="Keep the base model in a process of its own, or load it anew for each message.")
    ] = True,
    peers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Public key of another node, got from its owner, or a folder of such; may be repeated. In secure "
            "sums this node then signs its keys, and masks only with keys that one of these nodes signed.",
        ),
    ] = None,
    trusted_entities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Run only apps that Flower's hub signed with one of these keys; this refuses fedlora run's own.",
        ),
    ] = None,
    metrics_port: Metrics = None,
    insecure: Insecure = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check this node's config and rows, without a server, and end.")
    ] = False,
    of_run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="CONFIG",
            help="With --check: TOML file or preset of the run; default: the default of every key.",
        ),
    ] = None,
) -> None:
    """Start a node. It trains on its own rows when the server asks it to; Ctrl-C stops it.

    With --check, nothing is started. The check names the lines of rows that cannot be used, and shows the classes, the
    lengths in tokens, and how many rows are cut, as fedlora data does for a run.

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
        "max-epsilon": max_epsilon,
        "peers": os.pathsep.join(str(path.expanduser().resolve()) for path in peers or ()) or None,
    }
    settings = configuration.parse_overrides(node_config or [])
    settings |= {name: value for name, value in given.items() if value is not None}
    if of_run is not None and not check:
        raise ConfigError(
            "node: --run works only with --check; a node that is started gets the run's config from the server"
        )
    own.check(settings)
    if settings.get("peers") and not check and (key is None or insecure):
        raise ConfigError("--peers: this node signs with its private key; give --key, and leave out --insecure")
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
def edge(
    *,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of the server above (fedlora server).")] = (
        _HERE
    ),
    ca: Authority = None,
    key: Annotated[
        Path | None,
        typer.Option(help="This edge's private key, which fedlora key made; registered on the server above."),
    ] = None,
    certs: Annotated[
        Path | None,
        typer.Option(help="Folder with the certificates of this edge's own server, which fedlora certs wrote."),
    ] = None,
    clients: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest number of clients in the region. At a run's start, the edge waits for so many, and for at "
            "most nine tenths of federation.wait-timeout.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the region in the run's record; default: the name of the key's file.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on for the region's nodes; 0.0.0.0 also accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on for the region's nodes.")] = 9093,
    state: State = None,
    insecure: Insecure = False,
) -> None:
    """Start an edge: one node towards the server above, and a server towards the nodes of its region.

    The server above sees the region's clients one by one, and what it learns is the same as if they were its own
    nodes. Between the two goes one message for all of the region's clients, and the nodes need no way to the server
    above. A node of the region may be an edge, too. Ctrl-C stops the edge.

    Make the certificates of the edge's own server with fedlora certs, and register the region's nodes there with
    fedlora register --server and the edge's address. Register the edge's own key on the server above.

    Examples:

      fedlora edge --server fed.example.org:9092 --ca root/ca.crt --key keys/europe --certs certs --host 0.0.0.0 --port
      9093 --clients 4
    """
    from fedlora.deployment.edge import keep

    folder = state or _state_folder("edge", key.stem if key else str(port))
    with _told_to_stop(insecure):
        keep(
            server,
            ca,
            key,
            name=name or (key.stem if key else f"edge-{port}"),
            clients=clients,
            certs=certs,
            host=host,
            port=port,
            state=folder,
            insecure=insecure,
        )


@app.command()
def worker(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on; only its owner can open it.")],
    node_pid: Annotated[int | None, typer.Option(help="Process id of the node; the worker ends with it.")] = None,
    idle: Annotated[float, typer.Option(min=1, help="Seconds without a message after which the worker ends.")] = 3600.0,
) -> None:
    """Keep the base model in memory and answer a node's messages. fedlora node starts this by itself."""
    quiet()
    from fedlora.clients.worker.process import serve  # pyright: ignore[reportMissingImports]

    serve(socket, node_pid, idle)


@app.command()
def key(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File for the private key; the public key is PATH.pub.")],
) -> None:
    """Make a key pair for a node. Run this on the node itself, so that the private key never leaves it.

    No file is overwritten. Send PATH.pub to the person who runs the server, and read its fingerprint to them over the
    telephone. They let the node take part with fedlora register.

    Examples:

      fedlora key keys/north
    """
    from fedlora.deployment import certificates

    made = certificates.make_key(path)
    out.print(f"{path}: the private key, which stays here", soft_wrap=True)
    out.print(f"{path}.pub: {made}; register it on the server: fedlora register {path.name}.pub", soft_wrap=True)


@app.command()
def register(
    keys: Annotated[list[Path], typer.Argument(metavar="KEY.pub...", help="Files with nodes' public keys.")],
    server: Server = _HERE,
    ca: Authority = None,
    *,
    replaces: Annotated[
        str,
        typer.Option(metavar="NODE", help="Remove this node's key; the new key gets the node's name and its clients."),
    ] = "",
) -> None:
    """Register nodes' public keys on a server, so that these nodes may take part. A node's name is that of its file.

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
        typer.Argument(metavar="NODE...", help="Names, numbers or fingerprints from fedlora nodes, or .pub files."),
    ],
    server: Server = _HERE,
    ca: Authority = None,
) -> None:
    """Remove nodes from a federation for good. Their keys cannot be registered again."""
    from fedlora.deployment import nodes

    for line in nodes.unregister(names, server, ca):
        out.print(line, soft_wrap=True, markup=False)


@app.command(name="nodes")
def list_nodes(server: Server = _HERE, ca: Authority = None) -> None:
    """List a server's nodes: name, key, state, and the time at which each last connected or left."""
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
    """Around a program that runs until Ctrl-C, which then counts as a normal end."""
    quiet()
    if insecure:
        err.print("[yellow]warning:[/yellow] --insecure: anyone who reaches this port can read all and take part")
    try:
        yield
    except KeyboardInterrupt:
        out.print("stopped")
