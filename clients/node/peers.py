"""The other nodes of a federation: their public keys, which this node's owner got from their owners."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from fedlora.common.errors import ConfigError
from fedlora.config import Scalar


@dataclass(frozen=True, repr=False)
class Peers:
    """Whose signatures count in secure sums.

    Args:
        own: the node's private key.
        others: the public keys of the other nodes.
    """

    own: EllipticCurvePrivateKey
    others: tuple[EllipticCurvePublicKey, ...]


def of(settings: Mapping[str, Scalar]) -> Peers | None:
    """The peers that a node's config names; None if it names none.

    Raises:
        ConfigError: a file is missing or has no key of its kind, or the node has no key of its own.
    """
    others = public(settings)
    if not others:
        return None
    try:
        own = serialization.load_ssh_private_key(Path(str(settings.get("key", ""))).read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        own = None
    if not isinstance(own, EllipticCurvePrivateKey):
        raise ConfigError(
            "node config: peers needs the node's private key, which fedlora key makes, and key names none"
        )
    return Peers(own, others)


def public(settings: Mapping[str, Scalar]) -> tuple[EllipticCurvePublicKey, ...]:
    """The public keys that a node's config names as `peers`: files, or folders with files *.pub.

    Raises:
        ConfigError: a file is missing, or has no public key of a node.
    """
    named = settings.get("peers", "")
    if not isinstance(named, str):
        raise ConfigError(f"node config: peers = {named!r}, expected files with public keys, separated by {os.pathsep}")
    found: list[EllipticCurvePublicKey] = []
    for name in filter(None, named.split(os.pathsep)):
        files = sorted(Path(name).glob("*.pub")) if Path(name).is_dir() else [Path(name)]
        if not files:
            raise ConfigError(f"node config: peers: the folder {name} has no file *.pub with a public key")
        found += map(_read, files)
    return tuple(found)


def _read(path: Path) -> EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"node config: peers: {path} has no public key of a node: {error}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise ConfigError(f"node config: peers: {path} has another kind of key than fedlora key makes")
    return key
