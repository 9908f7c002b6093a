"""The exceptions. A message says in one sentence what is wrong, where, what was expected, and how to fix it."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

NO_ROOM = {errno.ENOSPC, errno.EFBIG} | {getattr(errno, name) for name in ("EDQUOT",) if hasattr(errno, name)}
_OF_THE_DISK = NO_ROOM | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ELOOP,
}
_SAFETENSORS = re.compile(r"I/O error: (.+) \(os error (\d+)\)")


class FedLoraError(Exception):
    """Base of all errors that a user can cause or run into; the command prints them without a traceback."""


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
    """The loss of a training is not finite, after some steps or from the start."""


class StrategyError(FedLoraError):
    """A strategy does not exist, or cannot serve these clients.

    Args:
        message: what is wrong.
        needs: the attribute of `Strategy` that this one lacks ("unequal_ranks", "steady"), or several of which one
            would do ("linear or of_ideal"). The registry of strategies catches the error and adds the names of the
            strategies that have it.
    """

    def __init__(self, message: str, needs: str = "") -> None:
        super().__init__(message)
        self.needs = needs


class TaskError(FedLoraError):
    """A task returned something else than `fedlora.tasks.base.Task` requires."""


class WireError(FedLoraError):
    """A message is malformed, of another protocol version, or made for another base model."""


class RunError(FedLoraError):
    """The federation cannot go on: too few clients answered, or the engine failed."""


def of_the_disk(error: BaseException) -> str:
    """The message for an error about a file or folder that cannot be used; empty for other errors."""
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason, number = error.strerror or "", error.errno
    elif found := _SAFETENSORS.search(str(error)):  # safetensors has exceptions of its own
        where, reason, number = "", found[1], int(found[2])
    else:
        return ""
    fix = "make room" if number in NO_ROOM else "give another path, or make this one usable"
    return f"{where or 'a file that this command writes'}: {reason}; {fix}"


def suggest(got: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the nearest known name, or the list of all known names if none is near."""
    names = sorted(known)
    near = get_close_matches(got, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"
