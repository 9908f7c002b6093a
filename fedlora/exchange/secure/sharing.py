"""Secrets split among neighbours, so that so many of them together can give it back, and fewer know nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from Crypto.Protocol.SecretSharing import Shamir

from fedlora.common.errors import WireError

from .keys import SECRET


def split(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Client id -> its share, 16 bytes: Shamir's scheme over GF(2^128).

    Args:
        secret: 16 bytes.
        holders: ids of the clients that get a share, at least `threshold`.
        threshold: number of shares that give the secret back.
    """
    shares = Shamir.split(threshold, len(holders), secret, ssss=False)
    return {holder: share for holder, (_, share) in zip(sorted(holders), shares, strict=True)}


def combine(shares: Mapping[int, bytes], holders: Sequence[int], threshold: int) -> bytes:
    """The secret, from the shares of at least `threshold` holders.

    Args:
        shares: client id -> the share that it opened.
        holders: ids of all clients that were given one.
        threshold: as in `split`.

    Raises:
        WireError: there are too few shares, or one is of a client that has none or has a wrong length.
    """
    places = {holder: place for place, holder in enumerate(sorted(holders), start=1)}
    if unknown := sorted(shares.keys() - places.keys()):
        raise WireError(f"client {unknown[0]} opened a share that it was never given")
    if short := [holder for holder, share in shares.items() if len(share) != SECRET]:
        raise WireError(f"client {short[0]} opened a share of a wrong length, expected {SECRET} bytes")
    if len(shares) < threshold:
        raise WireError(f"{len(shares)} of the {threshold} shares that a secret needs were opened")
    chosen = sorted(shares)[:threshold]
    return Shamir.combine([(places[holder], shares[holder]) for holder in chosen], ssss=False)
