"""Masks: streams of random words modulo 2^64 that are added to a client's numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from .keys import RoundSecrets, pair_key, self_key
from .numbers import Words


def stream(key: bytes, count: int, part: int = 0) -> Words:
    """So many words of the ChaCha20 key stream.

    Args:
        key: 32 bytes.
        count: number of words of 8 bytes.
        part: number of the sum in its round; a key gives each of a round's sums other words.
    """
    nonce = bytes(8) + part.to_bytes(8, "big")
    encryptor = Cipher(ChaCha20(key, nonce), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


def between(own: int, other: int, secret: bytes, theirs: bytes, *, context: bytes, count: int, part: int = 0) -> Words:
    """What client `own` adds for its neighbour `other`; what the neighbour adds for it is the negative.

    Args:
        own: id of the client that adds it.
        other: id of the neighbour.
        secret: the secret of one side's masking key.
        theirs: the public masking key of the other side.
        context: of the round.
        count: number of words.
        part: number of the sum in its round.
    """
    words = stream(pair_key(secret, theirs, context), count, part)
    return words if own < other else np.negative(words)


def of_self(self_mask: bytes, context: bytes, count: int, part: int = 0) -> Words:
    """A client's self-mask, which keeps its numbers hidden if the server has opened its masking key too early."""
    return stream(self_key(self_mask, context), count, part)


def masked(words: Words, own: int, secrets: RoundSecrets, neighbours: Mapping[int, bytes], part: int = 0) -> Words:
    """A client's numbers, as they may be seen.

    Args:
        words: its numbers in fixed point, [n].
        own: the client's id.
        secrets: the client's secrets of this round.
        neighbours: id -> public masking key of each neighbour that has shared its secrets.
        part: number of the sum in its round.
    """
    context, count = secrets.context, len(words)
    total = words + of_self(secrets.self_mask, context, count, part)
    for other, theirs in neighbours.items():
        total += between(own, other, secrets.masking, theirs, context=context, count=count, part=part)
    return total
