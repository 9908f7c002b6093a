"""Objects that a caller gave to a run, and the names that stand for them in its configuration.

A configuration has scalars only, so that it can be sent and recorded. The name of an object is known in this process
only, and only until the object is released.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from .errors import FedLoraError

_PREFIX = "given:"
_numbers = count()
_held: dict[str, Any] = {}


def hold(thing: Any, label: str) -> str:
    """Keep an object, and return its name, such as "given:0-rows". No name is used twice."""
    name = f"{_PREFIX}{next(_numbers)}-{label}"
    _held[name] = thing
    return name


def release(name: str) -> None:
    """Forget an object."""
    _held.pop(name, None)


def is_given(name: str) -> bool:
    """Whether a name has the form of an object's name."""
    return name.startswith(_PREFIX)


def is_here(name: str) -> bool:
    """Whether a name stands for an object in this process."""
    return name in _held


def find(name: str, key: str, error: type[FedLoraError]) -> Any:
    """The object of this name.

    Args:
        name: a name that `hold` returned.
        key: the configuration key that has the name, for the message.
        error: class of the error that is raised if there is no such object.
    """
    if name not in _held:
        raise error(
            f"{key} = {name!r} stood for an object of the Python program that started the run, but that program has "
            f"ended or released it; set {key} to a name or a path instead"
        )
    return _held[name]
