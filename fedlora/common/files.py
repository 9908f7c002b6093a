"""Files that are complete or absent, and survive a power failure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written in the block; at its end, the file is on the disk and replaces `path`.

    After an error, such as a full disk, the old file is unchanged, and the new one is removed.

    Example:
        >>> with replacing(path) as part:
        ...     part.write_text("all of it")
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: object) -> None:
    """Write a JSON file that is complete or absent, and survives a power failure; non-finite numbers become null."""
    text = json.dumps(finite(data), indent=2, allow_nan=False) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null in place of every number that is not finite, which JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _sync_folder(folder: Path) -> None:
    """Write a folder to the disk, without which a renamed file is not safe; not needed or possible on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
