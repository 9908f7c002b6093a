"""Round keys signed by nodes: what another round, another client or another node has signed does not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.common.errors import WireError
from fedlora.exchange.secure.keys import RoundSecrets
from fedlora.exchange.secure.signatures import fingerprint_of, sign, signer

ROUND = b"run/3/" + b"ab" * 16
NORTH, SOUTH, EVE = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
PEERS = {fingerprint_of(key.public_key()): key.public_key() for key in (NORTH, SOUTH)}
KEYS = RoundSecrets.draw(ROUND).public
SIGNED = replace(KEYS, signature=sign(NORTH, 4, KEYS, ROUND))


def test_the_peer_that_signed_is_found():
    assert signer(PEERS, 4, SIGNED, ROUND) == fingerprint_of(NORTH.public_key())
    assert SIGNED == KEYS  # signed again they have another signature, and are the same keys
    assert len(SIGNED.signature) <= 200


def test_keys_that_no_peer_signed_are_refused_and_the_client_is_named():
    with pytest.raises(WireError, match="the keys of client 4 are not signed; its node needs --peers too"):
        signer(PEERS, 4, KEYS, ROUND)
    stranger = replace(KEYS, signature=sign(EVE, 4, KEYS, ROUND))
    with pytest.raises(WireError, match="client 4 are signed by a node that is none of this node's --peers"):
        signer(PEERS, 4, stranger, ROUND)


@pytest.mark.parametrize("about", ["round", "try", "client", "keys", "peer", "bytes"])
def test_a_signature_of_something_else_is_refused(about):
    client, keys, context = 4, SIGNED, ROUND
    if about == "round":
        context = ROUND.replace(b"/3/", b"/4/")
    elif about == "try":
        context = ROUND.replace(b"ab", b"cd")
    elif about == "client":
        client = 5
    elif about == "keys":
        keys = replace(SIGNED, masking=RoundSecrets.draw(ROUND).public.masking)
    elif about == "peer":  # a stranger's signature under a peer's name
        keys = replace(KEYS, signature=fingerprint_of(NORTH.public_key()) + sign(EVE, 4, KEYS, ROUND)[32:])
    else:
        keys = replace(SIGNED, signature=SIGNED.signature[:-1])
    with pytest.raises(WireError, match=f"the keys of client {client} have a wrong signature: it is of other keys, an"):
        signer(PEERS, client, keys, context)
