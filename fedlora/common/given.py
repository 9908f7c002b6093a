"""Objects that a caller gave to a run, by the names that stand for them in its configuration.

A configuration holds scalars alone, so that it can be sent and recorded. An object is known by its name in this process
alone, and until it is released.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from .errors import FedLoraError

_PREFIX = "given:"
_numbers = count()
_held: dict[str, Any] = {}


def hold(thing: Any, label: str) -> str:
    """Keep an object; its name, such as "given:0-rows". No name is ever used again."""
    name = f"{_PREFIX}{next(_numbers)}-{label}"
    _held[name] = thing
    return name


def release(name: str) -> None:
    """Let go of an object."""
    _held.pop(name, None)


def is_given(name: str) -> bool:
    """Whether a name can only stand for an object."""
    return name.startswith(_PREFIX)


def is_here(name: str) -> bool:
    """Whether a name stands for an object that this process holds."""
    return name in _held


def find(name: str, key: str, error: type[FedLoraError]) -> Any:
    """The object of this name.

    Args:
        name: as `hold` gave it.
        key: the configuration key that has the name, for the message.
        error: raised where the object is not here.
    """
    if name not in _held:
        raise error(
            f"{key} = {name!r} stood for an object of the Python program that started the run, and that program has "
            f"ended or let go of it; set {key} to a name or a path in its place"
        )
    return _held[name]
