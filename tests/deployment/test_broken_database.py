"""A SuperLink's database that a killed start left is told from a whole one, a new one, and none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedlora.cli import doctor
from fedlora.common import processes
from fedlora.common.errors import RunError
from fedlora.deployment import server, superlink_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The database that Flower's own steps make."""
    path = tmp_path_factory.mktemp("superlink") / "whole.db"
    superlink_data._finish(path)
    return path.read_bytes()


def changed(path: Path, whole: bytes, *statements: str) -> Path:
    path.write_bytes(whole)
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def test_nothing_is_wrong_with_a_whole_one_a_new_one_or_none(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "whole.db").write_bytes(whole)
    (tmp_path / "new.db").touch()
    for name in ("whole.db", "new.db", "none.db"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        assert superlink_data.broken(tmp_path / name) == ""
        after = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        assert after == before  # it is looked at, and not changed


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM alembic_version",
        "UPDATE alembic_version SET version_num = '33e2f70642b1'",
    ],  # as when killed early, late
)
def test_what_a_killed_start_leaves_is_named_with_what_to_do(tmp_path: Path, whole: bytes, statement: str) -> None:
    path = changed(tmp_path / "superlink.db", whole, statement)
    fault = superlink_data.broken(path)
    assert fault.startswith(f"{path}: a SuperLink was killed while it made this database (")
    assert "delete it" in fault
    assert "\n" not in fault


def test_a_server_refuses_it_before_flower_starts(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(processes, "start", start)
    path = changed(tmp_path / "superlink.db", whole, "DELETE FROM alembic_version")
    with pytest.raises(RunError, match="a SuperLink was killed while it made this database"):
        server.serve(
            None, host="127.0.0.1", port=processes.free_port(), state=tmp_path / "state", database=path, insecure=True
        )


def test_doctor_looks_at_the_one_of_flwr_run(tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert doctor._local_superlink() == []
    (tmp_path / "local-superlink").mkdir()
    path = changed(tmp_path / "local-superlink" / "state.db", whole)
    assert [finding.ok for finding in doctor._local_superlink()] == [True]
    changed(path, whole, "DELETE FROM alembic_version")
    (found,) = doctor._local_superlink()
    assert not found.ok
    assert str(path) in found.advice
