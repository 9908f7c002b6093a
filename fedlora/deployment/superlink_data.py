"""The SuperLink's database: it gives room back that is not used any more, and says when its disk is full, or when a
start that was killed left a part of it.

What nodes upload lies in it until it is read; SQLite keeps the room for good unless it is told otherwise.
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

ROOM = 32 << 20  # bytes; a message's piece is 5 MB, and the log of changes grows beside the database
_FULL = 1  # auto_vacuum: pages that are free go with the change that freed them
_MOST_LOG = 64 << 20  # bytes of changes that are not yet in the database's file
_BUSY_SECONDS = 5.0
_log = logging.getLogger("fedlora")


def prepare(database: Path) -> None:
    """Before the SuperLink opens it: a database that gives back what it does not need, made where there is none.

    Raises:
        RunError: it cannot be opened or written, is no database, or is a part of one.
    """
    known = database.is_file()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as link:
            if link.execute("PRAGMA auto_vacuum").fetchone()[0] != _FULL:
                link.execute(f"PRAGMA auto_vacuum = {_FULL}")
                link.execute("VACUUM")  # which is when a database takes it on
    except (sqlite3.Error, OSError) as error:
        hint = f"; {said}" if (said := full(database)) else ""
        raise RunError(f"{database}: the SuperLink's database cannot be used: {error}{hint}") from None
    if known and (fault := broken(database)):
        raise RunError(fault)


def broken(path: Path) -> str:
    """What is wrong with a SuperLink's database, and what to do; empty where nothing is, or where there is none yet.

    SQLite makes Flower's tables one after another. A SuperLink that is killed amid that leaves some of them, and the
    next one fails to make them again. Flower's own steps are therefore tried on a copy, unless all were done.
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
    except Exception as error:  # of Flower's steps, of SQLAlchemy, or of SQLite
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{path}: a SuperLink was killed while it made this database ({reason}), and none can start on it; delete "
            f"it, or move it away if it was in use before"
        )
    return ""


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


def _is_whole(path: Path) -> bool:
    """Whether Flower has nothing more to do to it."""
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
    """What the SuperLink does to its database when it starts."""
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
