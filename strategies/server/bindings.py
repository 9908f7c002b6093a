"""The keys to which client ids belong. An id is bound to the key of the node that first uses it, for all later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from flwr.serverapp import Grid

from fedlora.common.errors import RunError
from fedlora.common.files import write_json

# Environment variable with the path of the file of bindings, which `fedlora server` sets for its runs. Without node
# authentication there are no keys.
VARIABLE = "FEDLORA_CLIENT_KEYS"


@dataclass(frozen=True)
class Identity:
    """A node as the SuperLink knows it.

    Attributes:
        key: the name under which the node's public key was registered, or else a digest of the key; empty without node
            authentication. A key that replaces another one takes over its name, and with it its clients.
        registered: the time of registration, as a text of Flower's that sorts by time.
    """

    key: str = ""
    registered: str = ""


def identities(grid: Grid) -> Mapping[int, Identity]:
    """Node id -> identity; empty for a grid whose nodes have no identities, such as that of the in-process engine."""
    try:
        nodes = list(grid.get_nodes())
    except (AttributeError, NotImplementedError):
        return {}
    return {node.node_id: Identity(node.name or _digest(node.public_key), node.registered_at) for node in nodes}


def bind(clients: Mapping[int, str]) -> None:
    """Bind client ids to keys. An id that is bound already is not changed.

    Args:
        clients: client id -> `Identity.key` of its node; clients with an empty key are left out.

    Raises:
        RunError: the server's file of bindings cannot be read or written.
    """
    path = _path()
    if path is None:
        return
    try:
        with FileLock(f"{path}.lock"):
            before = known()
            after = {client: key for client, key in clients.items() if key} | before
            if after != before:
                write_json(path, dict(sorted(after.items())))
    except OSError as error:
        raise RunError(f"{path}: the keys of clients cannot be written: {error}") from None


def where() -> str:
    """The path of the file of bindings, for messages."""
    return str(_path() or "")


def _path() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def known() -> dict[int, str]:
    """Client id -> key to which the id is bound.

    Raises:
        RunError: the server's file of bindings cannot be read.
    """
    path = _path()
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(
            name.isdigit() and isinstance(key, str) for name, key in found.items()
        ):
            raise ValueError("it is not a table of client ids and keys")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the keys of clients cannot be read: {error}; put a copy back, or remove it") from None
    return {int(name): key for name, key in found.items()}


def _digest(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()[:16] if public_key else ""
