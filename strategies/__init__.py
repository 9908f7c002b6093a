"""The server side: aggregation strategies, the round loop and Flower's ServerApp."""

if not __name__.startswith("fedlora."):
    raise ImportError(f"import this folder as fedlora.{__name__}, not as {__name__}")

from .registry import load

__all__ = ["load"]
