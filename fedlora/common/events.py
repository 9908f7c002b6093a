"""Events of a run, and their listeners, such as progress bars, logs and tests. A run needs no listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

_listeners: list[Listener] = []


def emit(kind: str, **facts: Any) -> None:
    """Call every listener, for instance by `emit("client-step", client_id=0, step=1, steps=8)`."""
    for listener in _listeners:
        listener(kind, facts)


def has_listeners() -> bool:
    """Whether there is any listener."""
    return bool(_listeners)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Within the block, call `listener(kind, facts)` for every event of this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
