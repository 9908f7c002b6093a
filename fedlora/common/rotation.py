"""Logs that never fill a disk: at a size they become file.1, what was that file.2, and the oldest goes."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

MOST_BYTES, OLDER = 10 << 20, 5


def rotate(path: Path, most: int = MOST_BYTES, older: int = OLDER) -> None:
    """Move a log that has this many bytes, or more, out of the way.

    Args:
        path: of the log; nothing happens where there is none.
        most: bytes; 0 moves any that is not empty.
        older: so many earlier ones stay.
    """
    with suppress(FileNotFoundError):  # another process was faster
        if path.stat().st_size <= max(0, most - 1):
            return
        for number in range(older, 0, -1):
            earlier = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if earlier.exists():
                earlier.replace(path.with_name(f"{path.name}.{number}"))


class Log:
    """A log file that several threads write, line by line; what an earlier process wrote is moved out of the way."""

    def __init__(self, path: Path, most: int = MOST_BYTES, older: int = OLDER) -> None:
        self._path, self._most, self._older = path, most, older
        self._lock = threading.Lock()
        rotate(path, 0, older)
        path.write_bytes(b"")

    def write(self, line: bytes) -> None:
        """Append; a disk that is full costs lines, and not the process."""
        with self._lock, suppress(OSError):
            rotate(self._path, self._most, self._older)
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
