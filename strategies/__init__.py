"""The server side: aggregation strategies, the round loop and Flower's ServerApp.

The names that a user's own strategy needs can be imported from here; torch is loaded with the first one that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __name__.startswith("fedlora."):
    raise ImportError(f"import this folder as fedlora.{__name__}, not as {__name__}")

from .registry import load

if TYPE_CHECKING:
    from .base import ServerState, Strategy
    from .tools.replies import arrivals

__all__ = ["ServerState", "Strategy", "arrivals", "load"]
_LATER = {"ServerState": ".base", "Strategy": ".base", "arrivals": ".tools.replies"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
