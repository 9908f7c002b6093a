"""What a paired comparison over seeds can detect, and how many seeds a difference needs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

LEVEL, POWER = 0.05, 0.8  # the usual choices (Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences")


def power(difference: float, spread: float, seeds: int, level: float = LEVEL) -> float:
    """The probability that a two-sided paired t-test finds a difference.

    Args:
        difference: the true mean of the differences.
        spread: their standard deviation over seeds, above 0.
        seeds: number of pairs, at least 2.
        level: of the test.
    """
    freedom, shift = seeds - 1, abs(difference) / spread * seeds**0.5
    edge = t.ppf(1 - level / 2, freedom) * _sample_spreads(freedom)
    return float((norm.sf(edge - shift) + norm.cdf(-edge - shift)).mean())


@cache
def _sample_spreads(freedom: int) -> np.ndarray:
    """Standard deviations of samples from a distribution with deviation 1, at evenly spaced quantiles.

    SciPy's noncentral t distribution, which has the same integral in closed form, is NaN for large shifts.
    """
    return np.sqrt(chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)


def detectable(spread: float, seeds: int, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest difference that is found with the wanted probability."""
    found: Any = brentq(lambda size: power(size * spread, spread, seeds, level) - wanted, 0.0, 1e6)
    return float(found) * spread


def seeds_needed(
    difference: float, spread: float, level: float = LEVEL, wanted: float = POWER, most: int = 10_000
) -> int | None:
    """The smallest number of seeds that finds a difference with the wanted probability; None: more than `most`."""
    low, high = 2, 2
    while power(difference, spread, high, level) < wanted:
        if high >= most:
            return None
        low, high = high, min(most, 2 * high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, spread, middle, level) >= wanted else (middle + 1, high)
    return high
