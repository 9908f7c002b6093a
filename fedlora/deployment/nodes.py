"""The nodes that a server knows: by the names under which their keys were registered, and how keys come and go."""

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

GONE = "unregistered"  # Flower's word; it never takes such a key again


@dataclass(frozen=True)
class Node:
    """A node whose key is registered, or was.

    Attributes:
        number: Flower's id of it.
        name: that it was registered under; empty where Flower's own command did it.
        key: its public key's fingerprint, as `ssh-keygen -l` shows it.
        state: online, offline, registered (and never seen), or unregistered.
        seen: when it last came or went; None before.
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
    """Let the server know the public keys of nodes, by the names of their files; returns one line about each.

    Args:
        keys: files of public keys.
        server: HOST:PORT.
        ca: certificate of the authority that signed the server's.
        replaces: a node whose key is taken away, and whose name and client ids the one new key gets.

    Raises:
        ConfigError: a file is missing or holds no key, a name is taken, or its key was unregistered.
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
                    f"{file}: this key was unregistered, and Flower takes none again; make a new one on the node: "
                    f"fedlora key {file.with_suffix('').name}-2"
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
                    f"--replaces {name} to take that key away"
                )
            if old:
                control.UnregisterNode(UnregisterNodeRequest(node_id=old.number))
            pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            number = control.RegisterNode(RegisterNodeRequest(public_key=pem, name=name)).node_id
            lines.append(f"{file.name}: registered as {name}, node {number}" + (f"; {old.key} is out" if old else ""))
    return lines


def unregister(names: Sequence[str], server: str, ca: Path | None) -> list[str]:
    """Take nodes out of the federation; a run that is on goes on without them.

    Args:
        names: of nodes, their numbers, their keys' fingerprints, or files of their public keys.
        server: HOST:PORT.
        ca: certificate of the authority that signed the server's.

    Raises:
        ConfigError: there is no such node; then none is taken out.
        RunError: the server cannot be reached or trusted.
    """
    with _control(server, ca) as control:
        nodes = _known(control)
        chosen = [_one(nodes, name) for name in names]
        for node in chosen:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node.number))
    return [f"{node.name or node.number}: out; its key {node.key} is never taken again" for node in chosen]


def _one(nodes: Sequence[Node], named: str) -> Node:
    """The node of this name, number, fingerprint or file that is not unregistered."""
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
    """Raises ConfigError for a file that holds no key of a kind that Flower takes."""
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{file}: holds no public key: {str(error) or type(error).__name__}; expected a node's .pub file, which "
            "fedlora key makes"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{file}: a key of another kind than Flower takes, NIST elliptic curves; use fedlora key")
    return key


@contextmanager
def _control(server: str, ca: Path | None) -> Iterator[ControlHttpClient]:
    """Flower's control interface of a server that was just found there; what goes wrong is one sentence."""
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
