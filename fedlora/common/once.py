"""Lines of the log that are said once in a process."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("fedlora")


@functools.lru_cache(maxsize=256)
def say_once(level: int, message: str, *args: str) -> None:
    """Log a line, unless the same line was logged before.

    Args:
        level: as logging.INFO.
        message: the line, with %s for each of args.
        args: what the message has to name.
    """
    _log.log(level, message, *args)
