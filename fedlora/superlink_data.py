"""The SuperLink's database: it gives room back that is not used any more, and says when its disk is full.

What nodes upload lies in it until it is read; SQLite keeps the room for good unless it is told otherwise.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from fedlora.errors import RunError

ROOM = 32 << 20  # bytes; a message's piece is 5 MB, and the log of changes grows beside the database
_FULL = 1  # auto_vacuum: pages that are free go with the change that freed them
_MOST_LOG = 64 << 20  # bytes of changes that are not yet in the database's file
_BUSY_SECONDS = 5.0
_log = logging.getLogger("fedlora")


def prepare(database: Path) -> None:
    """Before the SuperLink opens it: a database that gives back what it does not need, made where there is none.

    Raises:
        RunError: it cannot be opened or written, or is no database.
    """
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as link:
            if link.execute("PRAGMA auto_vacuum").fetchone()[0] != _FULL:
                link.execute(f"PRAGMA auto_vacuum = {_FULL}")
                link.execute("VACUUM")  # which is when a database takes it on
    except (sqlite3.Error, OSError) as error:
        hint = f"; {full(database)}" if full(database) else ""
        raise RunError(f"{database}: the SuperLink's database cannot be used: {error}{hint}") from None


def look_after(database: Path) -> None:
    """While the SuperLink runs: its log of changes stays small, and a disk that is full is said."""
    log = database.with_name(f"{database.name}-wal")
    with suppress(OSError, sqlite3.Error):  # busy now, and again in a while
        if log.stat().st_size > _MOST_LOG:
            with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as link:
                link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if said := full(database):
        _log.error("server: %s", said)


def full(database: Path) -> str:
    """That the disk is full on which a database lies; empty where it is not."""
    try:
        free = shutil.disk_usage(database.parent).free
    except OSError:
        return ""
    if free >= ROOM:
        return ""
    return f"the disk of the server's database is full: {database.parent} has {free >> 20} MB left; make room there"
