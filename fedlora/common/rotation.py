"""Logs of limited size: a log that is full becomes file.1, the file.1 before it file.2, and the oldest is removed."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

MOST_BYTES, OLDER = 10 << 20, 5


def rotate(path: Path, most: int = MOST_BYTES, older: int = OLDER) -> None:
    """Rename a log that has reached its largest size.

    Args:
        path: path of the log; nothing happens if there is no such file.
        most: the largest size in bytes; with 0, every log that is not empty is renamed.
        older: the number of earlier logs that are kept.
    """
    with suppress(FileNotFoundError):  # another process was faster
        if path.stat().st_size <= max(0, most - 1):
            return
        for number in range(older, 0, -1):
            earlier = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if earlier.exists():
                earlier.replace(path.with_name(f"{path.name}.{number}"))


class Log:
    """A log file that several threads write, line by line. The log of an earlier process is renamed first."""

    def __init__(self, path: Path, most: int = MOST_BYTES, older: int = OLDER) -> None:
        self._path, self._most, self._older = path, most, older
        self._lock = threading.Lock()
        rotate(path, 0, older)
        path.write_bytes(b"")

    def write(self, line: bytes) -> None:
        """Append a line; it is lost if the disk is full, and no error is raised."""
        with self._lock, suppress(OSError):
            rotate(self._path, self._most, self._older)
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
