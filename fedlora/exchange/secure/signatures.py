"""Signatures of nodes under the round keys of their clients, so that the server cannot put its own in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

from fedlora.common.errors import WireError

from .keys import PublicKeys

_FINGERPRINT = 32  # bytes


def fingerprint_of(key: EllipticCurvePublicKey) -> bytes:
    """SHA-256 of a node's public key, 32 bytes."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).digest()


def sign(node: EllipticCurvePrivateKey, client: int, keys: PublicKeys, context: bytes) -> bytes:
    """The fingerprint of the node's key, and its signature (ECDSA, SHA-384) under a client's keys of a round.

    Args:
        node: the private key of the client's node.
        client: the client's id.
        keys: what the client shows to the others.
        context: of the round; it has the run, the round and its try.
    """
    return fingerprint_of(node.public_key()) + node.sign(_text(client, keys, context), _HASH)


def signer(peers: Mapping[bytes, EllipticCurvePublicKey], client: int, keys: PublicKeys, context: bytes) -> bytes:
    """The fingerprint of the peer that has signed a client's keys.

    Args:
        peers: the nodes that may sign, by fingerprint.
        client: the client's id.
        keys: its keys, with the signature.
        context: of the round.

    Raises:
        WireError: they are not signed, or by nobody of the peers, or the signature is of other keys or another round.
    """
    name, signature = keys.signature[:_FINGERPRINT], keys.signature[_FINGERPRINT:]
    if not signature:
        raise WireError(f"the keys of client {client} are not signed; its node needs --peers too")
    if name not in peers:
        raise WireError(f"the keys of client {client} are signed by a node that is none of this node's --peers")
    try:
        peers[name].verify(signature, _text(client, keys, context), _HASH)
    except InvalidSignature:
        raise WireError(
            f"the keys of client {client} have a wrong signature: it is of other keys, another client or another round"
        ) from None
    return name


def _text(client: int, keys: PublicKeys, context: bytes) -> bytes:
    """What is signed; all parts but the last have a fixed length."""
    return b"fedlora round keys" + client.to_bytes(8, "big") + keys.masking + keys.letters + keys.self_mask + context


_HASH = ECDSA(hashes.SHA384())
