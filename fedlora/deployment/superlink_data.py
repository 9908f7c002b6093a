"""Looks after the SuperLink's database: frees unused space, and reports a full disk or an incomplete database.

Uploads of nodes are in the database until they are read. By default, SQLite would never give their space back. A
database is incomplete if a SuperLink was killed while it made it.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.common.errors import RunError

if TYPE_CHECKING:
    from sqlalchemy import Engine

ROOM = 32 << 20  # free bytes below which the disk counts as full; a piece of a message has 5 MB, and there is the log
_FULL = 1  # value of auto_vacuum with which free pages are given back at once
_MOST_LOG = 64 << 20  # largest number of bytes of changes that are not yet in the database's file
_BUSY_SECONDS = 5.0
_log = logging.getLogger("fedlora")


def prepare(database: Path) -> None:
    """Make the database, or set it up, so that it gives unused space back; called before the SuperLink opens it.

    Raises:
        RunError: the file cannot be opened or written, is not a database, or is incomplete.
    """
    known = database.is_file()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as link:
            if link.execute("PRAGMA auto_vacuum").fetchone()[0] != _FULL:
                link.execute(f"PRAGMA auto_vacuum = {_FULL}")
                link.execute("VACUUM")  # only this makes the setting effective
    except (sqlite3.Error, OSError) as error:
        hint = f"; {said}" if (said := full(database)) else ""
        raise RunError(f"{database}: the SuperLink's database cannot be used: {error}{hint}") from None
    if known and (fault := broken(database)):
        raise RunError(fault)


def broken(path: Path) -> str:
    """The fault of a SuperLink's database, and what to do; empty if there is no fault, or no database yet.

    SQLite makes Flower's tables one after another. If a SuperLink is killed meanwhile, some of them are there, and the
    next SuperLink fails when it makes them again. Unless all steps were done, Flower's steps are tried on a copy.
    """
    if not path.is_file():
        return ""
    try:
        if _is_whole(path):
            return ""
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "copy.db"
            for suffix in ("", "-wal", "-shm"):
                if (part := path.with_name(path.name + suffix)).is_file():
                    shutil.copyfile(part, copy.with_name(copy.name + suffix))
            _finish(copy)
    except Exception as error:  # errors of Flower's steps, of SQLAlchemy, or of SQLite
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{path}: a SuperLink was killed while it made this database ({reason}), and none can start with it; "
            f"delete it, or move it away if it was in use before"
        )
    return ""


def look_after(database: Path) -> None:
    """Keep the database's log of changes small, and report a full disk; called while the SuperLink runs."""
    log = database.with_name(f"{database.name}-wal")
    with suppress(OSError, sqlite3.Error):  # if the database is busy, the next call will do
        if log.stat().st_size > _MOST_LOG:
            with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as link:
                link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if said := full(database):
        _log.error("server: %s", said)


def full(database: Path) -> str:
    """The message that the disk of a database is full; empty if it is not."""
    try:
        free = shutil.disk_usage(database.parent).free
    except OSError:
        return ""
    if free >= ROOM:
        return ""
    return f"the disk of the server's database is full: {database.parent} has {free >> 20} MB left; make room there"


def _is_whole(path: Path) -> bool:
    """Whether Flower has done all steps that make its database."""
    from alembic.script import ScriptDirectory
    from flwr.supercore.state.alembic.utils import ALEMBIC_VERSION_TABLE, build_alembic_config

    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        there = database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (ALEMBIC_VERSION_TABLE,)).fetchone()
        versions = database.execute(f"SELECT version_num FROM {ALEMBIC_VERSION_TABLE}").fetchall() if there else []
    engine = _engine(path)
    try:
        heads = ScriptDirectory.from_config(build_alembic_config(engine)).get_heads()
        return {version for (version,) in versions} == {*heads}
    finally:
        engine.dispose()


def _finish(path: Path) -> None:
    """Do the steps that the SuperLink does with its database when it starts."""
    from alembic import command
    from flwr.supercore.state.alembic.utils import FLWR_STATE_LATEST_REVISIONS, build_alembic_config

    engine = _engine(path)
    try:
        command.upgrade(build_alembic_config(engine), FLWR_STATE_LATEST_REVISIONS)
    finally:
        engine.dispose()


def _engine(path: Path) -> Engine:
    from sqlalchemy import create_engine

    return create_engine(f"sqlite:///{path}")
