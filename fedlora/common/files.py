"""Files that are there whole or not at all, and stay there when the power fails."""

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
    """A file to write beside `path`; it takes the place of `path` at the block's end, once it is on the disk.

    After an error, a full disk for instance, the old file is as it was, and the room of the new one is free again.

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
    """Write whole or not at all, durably. Numbers that are not finite become null."""
    text = json.dumps(finite(data), indent=2, allow_nan=False) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value as JSON can hold it: null for every number in it that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _sync_folder(folder: Path) -> None:
    """A renamed file is only safe once its folder is on the disk too; Windows cannot open folders, and need not."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
