"""The exception tree. A message says what, where, got, expected and fix, in one sentence."""

from collections.abc import Iterable
from difflib import get_close_matches


class FedLoraError(Exception):
    """Base of every error that the user can cause or meet; the CLI prints it without a traceback."""


class ConfigError(FedLoraError):
    """A key or a value of the run configuration is wrong."""


class AssetError(FedLoraError):
    """A packaged model or data set could not be fetched or does not match its checksum."""


class ModelError(FedLoraError):
    """A base model could not be loaded, or is not the one that was asked for."""


class DataError(FedLoraError):
    """A data source cannot be read, lacks a column, or leaves a client without examples."""


class AdapterError(FedLoraError):
    """Factors have the wrong names, shapes or values."""


class DivergedError(AdapterError):
    """Training, or what it started from, left the finite numbers."""


class StrategyError(FedLoraError):
    """A strategy does not exist, or cannot serve these clients."""


class WireError(FedLoraError):
    """A message is malformed, of another protocol version, or made for another base model."""


class RunError(FedLoraError):
    """The federation cannot go on: too few clients answered, or the engine failed."""


def suggest(got: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the whole list when none is near."""
    names = sorted(known)
    near = get_close_matches(got, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"
