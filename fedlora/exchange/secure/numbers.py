"""Real numbers as integers modulo 2^64, whose sums are exact, and so the same in any order and under any masks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlora.common.errors import WireError

Words = NDArray[np.uint64]

# Bits behind the point. A number is rounded to a multiple of 2^-36, which is 1.5e-11.
_FRACTION = 36
_SCALE = 2.0**_FRACTION


def most(clients: int) -> float:
    """The largest magnitude of a number, such that the sum over so many clients cannot wrap around.

    With 16 clients this is 8.4e6, with a million clients 128.
    """
    return 2.0 ** (63 - _FRACTION - math.ceil(math.log2(max(clients, 2))))


def to_words(values: NDArray[np.float64], clients: int, who: str) -> Words:
    """The numbers in fixed point.

    Args:
        values: finite numbers, of any shape.
        clients: the largest number of clients whose numbers are added.
        who: whose numbers, for the message.

    Raises:
        WireError: a number is not finite, or so large that a sum over so many clients might wrap around.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= most(clients):  # also where it is not a number
        raise WireError(
            f"{who}: a number of magnitude {largest:.3g} has no place in a secure sum over {clients} clients, expected "
            f"at most {most(clients):.3g}; lower train.lr, or set train.max-grad-norm"
        )
    return np.rint(values * _SCALE).astype(np.int64).view(np.uint64)


def to_numbers(words: Words) -> NDArray[np.float64]:
    """The numbers of a sum in fixed point."""
    return words.view(np.int64).astype(np.float64) / _SCALE
