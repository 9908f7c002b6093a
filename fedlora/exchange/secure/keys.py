"""A client's secrets of one round, and what two clients agree on by their public keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.common.errors import WireError

SECRET = 16  # bytes of a secret that is shared
_NONCE = bytes(12)  # a letter's key is used once


@dataclass(frozen=True)
class PublicKeys:
    """What a client shows to all others in a round.

    Args:
        masking: X25519 public key, 32 bytes, by which it agrees with each neighbour on a mask.
        letters: another one, by which it encrypts shares for a neighbour.
        self_mask: SHA-256 of the secret of its self-mask, 32 bytes, by which a false share is noticed.
        signature: of its node under these keys, or empty; see `signatures`. It is another one each time that they are
            signed, and not a part of what is compared.
    """

    masking: bytes
    letters: bytes
    self_mask: bytes
    signature: bytes = field(default=b"", compare=False)

    def __post_init__(self) -> None:
        if {len(self.masking), len(self.letters), len(self.self_mask)} != {32}:
            raise WireError("a public key of a secure sum has a wrong length, expected 32 bytes")


@dataclass(frozen=True, repr=False)
class RoundSecrets:
    """A client's secrets of one round; never used for another one.

    Args:
        context: names the run and the round; it goes into all keys, so that none is of use elsewhere.
        masking: 16 bytes, of which the masking key is made.
        letters: 16 bytes, of which the key for letters is made.
        self_mask: 16 bytes, of which the self-mask is made.
    """

    context: bytes
    masking: bytes
    letters: bytes
    self_mask: bytes

    @classmethod
    def draw(cls, context: bytes) -> RoundSecrets:
        """New ones from the operating system."""
        return cls(context, os.urandom(SECRET), os.urandom(SECRET), os.urandom(SECRET))

    @property
    def public(self) -> PublicKeys:
        """What the others may know of them."""
        return PublicKeys(
            masking=public_of(self.masking, self.context, "masking"),
            letters=public_of(self.letters, self.context, "letters"),
            self_mask=fingerprint(self.self_mask, self.context),
        )

    def write(self, text: bytes, sender: int, receiver: int, theirs: PublicKeys) -> bytes:
        """A letter with this text, that only the receiver can read and nobody can change."""
        key = _agreed(self.letters, theirs.letters, self.context, "letters", _from_to(sender, receiver))
        return ChaCha20Poly1305(key).encrypt(_NONCE, text, _from_to(sender, receiver))

    def read(self, letter: bytes, sender: int, receiver: int, theirs: PublicKeys) -> bytes:
        """The text of a letter.

        Raises:
            WireError: it was changed on its way, or is not from this sender to this receiver in this round.
        """
        key = _agreed(self.letters, theirs.letters, self.context, "letters", _from_to(sender, receiver))
        try:
            return ChaCha20Poly1305(key).decrypt(_NONCE, letter, _from_to(sender, receiver))
        except InvalidTag:
            raise WireError(
                f"the letter with a share from client {sender} to client {receiver} was changed, or is of another round"
            ) from None


def public_of(secret: bytes, context: bytes, use: str) -> bytes:
    """The X25519 public key, 32 bytes, of a secret for a use, "masking" or "letters"."""
    return _private(secret, context, use).public_key().public_bytes_raw()


def is_usable(public: bytes) -> bool:
    """Whether two can agree on a secret by this X25519 public key."""
    try:
        _agreed(bytes(SECRET), public, b"", "", b"")
    except WireError:
        return False
    return True


def fingerprint(self_mask: bytes, context: bytes) -> bytes:
    """SHA-256 of the secret of a self-mask in a round."""
    return hashlib.sha256(b"fedlora self-mask" + context + self_mask).digest()


def same(left: bytes, right: bytes) -> bool:
    """Whether two secrets or keys are equal, in a time that does not depend on them."""
    return hmac.compare_digest(left, right)


def pair_key(secret: bytes, theirs: bytes, context: bytes) -> bytes:
    """The key, 32 bytes, of the mask between two neighbours; both compute the same.

    Args:
        secret: one's own secret of the masking key.
        theirs: the other's public masking key.
        context: of the round.
    """
    return _agreed(secret, theirs, context, "masking", b"")


def self_key(self_mask: bytes, context: bytes) -> bytes:
    """The key, 32 bytes, of a self-mask."""
    return _derived(self_mask, context, b"self-mask")


def _private(secret: bytes, context: bytes, use: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(secret, context, use.encode()))


def _agreed(secret: bytes, theirs: bytes, context: bytes, use: str, more: bytes) -> bytes:
    try:
        shared = _private(secret, context, use).exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:  # a point of small order gives zeros, which everybody knows
        raise WireError("a public key of a secure sum is no usable X25519 key") from None
    return _derived(shared, context, b"agreed " + use.encode() + more)


def _derived(secret: bytes, context: bytes, use: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"fedlora " + use + context).derive(secret)


def _from_to(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(8, "big") + receiver.to_bytes(8, "big")
