"""The database of Flower's SuperLink: what a start that was killed leaves of it, on which every later start fails."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine


def check(path: Path) -> str:
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
    except (Exception, SystemExit) as error:  # of Flower's, of SQLAlchemy's, or Flower's way to end a process
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{path}: a SuperLink was killed while it made this database ({reason}), and none can start on it; delete "
            f"it, or move it away if it was in use before"
        )
    return ""


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
    from flwr.supercore.state.alembic.utils import run_migrations

    engine = _engine(path)
    try:
        run_migrations(engine)
    finally:
        engine.dispose()


def _engine(path: Path) -> Engine:
    from sqlalchemy import create_engine

    return create_engine(f"sqlite:///{path}")
