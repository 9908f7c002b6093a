"""Many clients on one machine: the in-process engine and Flower's simulation engine."""

if not __name__.startswith("fedlora."):
    raise ImportError(f"import this folder as fedlora.{__name__}, not as {__name__}")
