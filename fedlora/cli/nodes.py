"""The commands on a federation's nodes and their keys: key, register, unregister, nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

members = typer.Typer()
out = Console(highlight=False)

Server = Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")]
Authority = Annotated[
    Path | None, typer.Option("--ca", help="Certificate of the authority behind the server: ca.crt of fedlora certs.")
]
_HERE = "127.0.0.1:9092"


@members.command()
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


@members.command()
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


@members.command()
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


@members.command(name="nodes")
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
