"""What Gaussian noise costs: epsilon for a delta, and the noise for an epsilon, both by Google's `dp-accounting`.

The library is an extra of the package (`fedlora[privacy]`), and is imported when the first number is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from .errors import ConfigError

# Width of the cells in which the library holds privacy losses. It rounds them up, so that a wider cell gives a larger
# epsilon, never a smaller one: at this width by 0.1 % where the library's own width of 1e-4 takes ten times as long.
_WIDTH = 1e-3
_TOLERANCE = 1e-3  # of the noise multiplier that is searched for


# (noise multiplier, rate, count) of releases that are alike; see `epsilon`.
Releases = tuple[float, float, int]


def epsilon(noise_multiplier: float, rate: float, count: int, delta: float) -> float:
    """The epsilon of `count` releases of a sum with Gaussian noise, by privacy loss distributions.

    Neighbours are two data sets of which one lacks one row (or client) of the other. Each release is of a sum to which
    a row adds a vector of norm at most C, with noise N(0, (noise_multiplier C)^2) in every coordinate. With a rate
    below 1, each row is in the sum with that probability, independently of the others and of the other releases, and
    nobody learns which rows were (Poisson sampling).

    Args:
        noise_multiplier: standard deviation of the noise over C, above 0.
        rate: probability with which a row is in a release, above 0; 1: every row is in each.
        count: number of releases; 0: none, which costs nothing.
        delta: of the guarantee, above 0 and below 1.

    Returns:
        An upper bound, above the exact value by about 0.1 %.

    Raises:
        ConfigError: the library is not installed.
    """
    return composed(((noise_multiplier, rate, count),), delta)


@lru_cache(maxsize=256)
def composed(releases: tuple[Releases, ...], delta: float) -> float:
    """The epsilon of releases that are not all alike, together; see `epsilon`.

    Raises:
        ConfigError: the library is not installed.
    """
    if not any(count for _, _, count in releases):
        return 0.0
    with _library() as (_, accountant):
        made = accountant()
        for each in releases:
            if each[2]:
                made.compose(_event(*each))
        return float(made.get_epsilon(delta))


@lru_cache(maxsize=256)
def noise_for(target: float, delta: float, rate: float, count: int) -> float:
    """The noise multiplier with which `count` releases have at most this epsilon; see `epsilon`.

    Args:
        target: the epsilon, above 0.
        delta, rate, count: as in `epsilon`; count at least 1.

    Returns:
        The smallest one, or up to 1e-3 more.

    Raises:
        ConfigError: the library is not installed, or no noise between 0 and 10^6 gives this epsilon.
    """
    with _library() as (library, accountant):
        try:
            found = library.calibrate_dp_mechanism(
                accountant, lambda noise: _event(noise, rate, count), target, delta, tol=_TOLERANCE
            )
        except library.NoBracketIntervalFoundError:
            raise ConfigError(
                f"privacy.epsilon = {target:g} at privacy.delta = {delta:g}: no noise gives this epsilon over {count} "
                "releases; set a larger privacy.epsilon, or fewer rounds and steps"
            ) from None
        return float(found)


def _event(noise_multiplier: float, rate: float, count: int) -> Any:
    import dp_accounting

    one = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(
        one if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, one), count
    )


@contextmanager
def _library() -> Iterator[tuple[Any, Any]]:
    """The library, and what makes an accountant; its remarks about its own search are not shown."""
    try:
        import dp_accounting
        from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    except ImportError as error:
        raise ConfigError(
            f"privacy.level needs the library dp-accounting, which counts the privacy that is spent, and it cannot be "
            f"imported ({error}); install it: pip install 'fedlora[privacy]'"
        ) from None
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield dp_accounting, lambda: PLDAccountant(value_discretization_interval=_WIDTH)
    finally:
        log.setLevel(level)
