"""Lists, registers and unregisters the nodes of a server, by the names under which their keys were registered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedlora.common.errors import ConfigError, RunError, suggest

from . import certificates
from .connection import check_server, given

GONE = "unregistered"  # Flower's state of a node whose key was removed; Flower never accepts such a key again


@dataclass(frozen=True)
class Node:
    """A node whose key is or was registered.

    Attributes:
        number: Flower's number of the node.
        name: name under which the node was registered; empty if Flower's own command registered it.
        key: fingerprint of the node's public key, as `ssh-keygen -l` shows it.
        state: online, offline, registered (and never seen), or unregistered.
        seen: time at which the node last connected or left; None if it never connected.
    """

    number: int
    name: str
    key: str
    state: str
    seen: datetime | None


def known(server: str, ca: Path | None) -> list[Node]:
    """All nodes that the server knows, in the order of registration.

    Raises:
        RunError: the server cannot be reached or trusted.
    """
    with _control(server, ca) as control:
        return _known(control)


def register(keys: Sequence[Path], server: str, ca: Path | None, replaces: str = "") -> list[str]:
    """Register public keys of nodes on a server, under the names of their files; return a line about each.

    Args:
        keys: files with public keys.
        server: address of the server, HOST:PORT.
        ca: certificate of the authority that signed the server's.
        replaces: a node whose key is removed, and whose name and client ids the one new key gets.

    Raises:
        ConfigError: a file is missing or has no key, a name is taken, or a key was unregistered.
        RunError: the server cannot be reached or trusted.
    """
    if replaces and len(keys) != 1:
        raise ConfigError(f"--replaces {replaces}: expected one new key, got {len(keys)}")
    files = [given(key, "KEY", "the public key of a node, such as certs/node0.pub") for key in keys]
    public = [_public(file) for file in files]
    lines: list[str] = []
    with _control(server, ca) as control:
        nodes = _known(control)
        for file, key in zip(files, public, strict=True):
            same = next((node for node in nodes if node.key == certificates.fingerprint(key)), None)
            if same and same.state == GONE:
                raise ConfigError(
                    f"{file}: this key was unregistered, and Flower never accepts it again; make a new one on the "
                    f"node: fedlora key {file.with_suffix('').name}-2"
                )
            if same:
                lines.append(f"{file.name}: registered already, as {same.name or same.number}")
                continue
            old = _one(nodes, replaces) if replaces else None
            name = (old.name if old else "") or file.stem
            taken = next((node for node in nodes if node.name == name and node.state != GONE and node != old), None)
            if taken:
                raise ConfigError(
                    f"{file}: a node is called {name!r} already, with key {taken.key}; give the file another name, or "
                    f"remove that key with --replaces {name}"
                )
            if old:
                control.UnregisterNode(UnregisterNodeRequest(node_id=old.number))
            pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            number = control.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id
            lines.append(
                f"{file.name}: registered as {name}, node {number}" + (f"; {old.key} is removed" if old else "")
            )
    return lines


def unregister(names: Sequence[str], server: str, ca: Path | None) -> list[str]:
    """Remove nodes from the federation; a run in progress goes on without them.

    Args:
        names: names of nodes, or their numbers, their keys' fingerprints, or files with their public keys.
        server: address of the server, HOST:PORT.
        ca: certificate of the authority that signed the server's.

    Raises:
        ConfigError: there is no such node; no node is removed then.
        RunError: the server cannot be reached or trusted.
    """
    with _control(server, ca) as control:
        nodes = _known(control)
        chosen = [_one(nodes, name) for name in names]
        for node in chosen:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node.number))
    return [f"{node.name or node.number}: removed; its key {node.key} cannot be registered again" for node in chosen]


def _one(nodes: Sequence[Node], named: str) -> Node:
    """The registered node with this name, number, fingerprint or file."""
    path = Path(named).expanduser()
    key = certificates.fingerprint(_public(path)) if path.suffix == ".pub" and path.is_file() else named
    present = [node for node in nodes if node.state != GONE]
    found = [node for node in present if key in (node.name, str(node.number), node.key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{named}: {len(found)} nodes have this name; give a number of fedlora nodes")
    names = [node.name or str(node.number) for node in present]
    raise ConfigError(f"{named}: no node of this name, number or key{suggest(named, names) if names else ''}")


def _known(control: ControlHttpClient) -> list[Node]:
    found = sorted(control.ListNodes(ListNodesRequest()).nodes_info, key=lambda info: info.registered_at)
    return [
        Node(
            number=info.node_id,
            name=info.name,
            key=certificates.fingerprint(serialization.load_pem_public_key(info.public_key)) if info.public_key else "",
            state=info.status,
            seen=max(map(_time, filter(None, (info.last_activated_at, info.last_deactivated_at))), default=None),
        )
        for info in found
    ]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _public(file: Path) -> ec.EllipticCurvePublicKey:
    """The public key in a file; raises ConfigError if there is no key of a kind that Flower accepts."""
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{file}: holds no public key: {str(error) or type(error).__name__}; expected a node's .pub file, which "
            "fedlora key makes"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{file}: the key is not of NIST elliptic curves, as Flower needs; make one with fedlora key")
    return key


@contextmanager
def _control(server: str, ca: Path | None) -> Iterator[ControlHttpClient]:
    """Flower's control interface of a server, after a check that it is there; its errors become RunErrors."""
    authority = given(ca, "--ca", "ca.crt")
    check_server(server, authority)
    control = ControlHttpClient.from_server_address(
        server_address=server,
        insecure=False,
        root_certificates=authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield control
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        hint = "; a proxy before it may keep this to the server's own machine" if code == httpx.codes.FORBIDDEN else ""
        raise RunError(f"the server at {server} refuses this ({code} {error.response.reason_phrase}){hint}") from None
    except httpx.TransportError as error:
        raise RunError(f"the server at {server} does not answer: {error or type(error).__name__}") from None
    finally:
        control.close()
