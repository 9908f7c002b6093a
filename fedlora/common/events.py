"""What happens in a run, told to whoever listens: progress bars, logs, tests. Listening is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

_listeners: list[Listener] = []


def emit(kind: str, **facts: Any) -> None:
    """Tell every listener, e.g. `emit("client-step", client_id=0, step=1, steps=8)`."""
    for listener in _listeners:
        listener(kind, facts)


def has_listeners() -> bool:
    """Whether anybody listens."""
    return bool(_listeners)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(kind, facts)` for everything emitted in this process within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
