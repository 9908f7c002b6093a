"""Presets: one flat TOML file each, its command in the first line."""

if not __name__.startswith("fedlora."):
    raise ImportError(f"import this folder as fedlora.{__name__}, not as {__name__}")
