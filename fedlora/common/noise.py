"""Random numbers for privacy: from the operating system's entropy, and not to be guessed from one another.

A run's seed is known to the server and stands in the record. Noise that was drawn from it could be computed again and
subtracted, so that nothing here takes a seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.special import ndtri

_KEY = 32  # bytes
_AT_ONCE = 2**20  # numbers that are made together; 8 MiB of them


class Noise:
    """A stream of numbers: the key stream of ChaCha20 (RFC 8439) under a key of its own.

    Args:
        key: 32 bytes, for tests alone; 32 fresh ones of the operating system when left out.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(_KEY) if key is None else key
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def normal(self, shape: Sequence[int], deviation: float) -> NDArray[np.float32]:
        """Independent numbers from N(0, deviation^2): the inverse of the normal distribution at uniform numbers.

        Args:
            shape: of the array.
            deviation: standard deviation, at least 0.
        """
        found = np.empty(math.prod(shape), np.float32)
        for start in range(0, len(found), _AT_ONCE):
            part = found[start : start + _AT_ONCE]
            np.multiply(ndtri(self._uniform(len(part))), deviation, out=part, casting="same_kind")
        return found.reshape(tuple(shape))

    def chosen(self, count: int, rate: float) -> list[int]:
        """Each of the numbers from 0 to count - 1 with the probability `rate`, independently (Poisson sampling)."""
        return np.flatnonzero(self._uniform(count) < rate).tolist()

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1), of 53 bits."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
