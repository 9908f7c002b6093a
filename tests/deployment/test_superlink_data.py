"""The SuperLink's database gives room back, and its disk's end is named."""

import random
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing

import httpx
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory

from fedlora.common.errors import RunError
from fedlora.deployment import superlink_data
from fedlora.strategies.server import link

MEGABYTE = 1 << 20


def grow(database, megabytes: int) -> None:
    """What a reply does that is stored, and deleted once it was read or refused; in Flower's own journal mode."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS uploads (id INTEGER PRIMARY KEY, content BLOB)")
        for _ in range(megabytes):
            connection.execute("INSERT INTO uploads (content) VALUES (zeroblob(?))", (MEGABYTE,))
        connection.commit()
        connection.execute("DELETE FROM uploads")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_what_was_deleted_takes_no_room(tmp_path):
    plain, ours = tmp_path / "plain.db", tmp_path / "state" / "superlink.db"
    grow(plain, 20)
    assert plain.stat().st_size > 20 * MEGABYTE, "SQLite alone keeps it"
    superlink_data.prepare(ours)
    grow(ours, 20)
    assert ours.stat().st_size < MEGABYTE
    superlink_data.prepare(plain)  # of an earlier version
    assert plain.stat().st_size < MEGABYTE
    grow(plain, 20)
    assert plain.stat().st_size < MEGABYTE


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # Flower's own use of alembic
@pytest.mark.parametrize("prepared", [True, False])
def test_a_reply_that_is_deleted_in_flowers_own_store_takes_no_room(tmp_path, prepared):
    database = tmp_path / "superlink.db"
    if prepared:
        superlink_data.prepare(database)
    store = ObjectStoreFactory(str(database)).store()
    data = random.Random(0).randbytes(30 * MEGABYTE)
    array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    reply = RecordDict({"adapter": ArrayRecord({"tensors": array})})
    store.preregister(1, get_object_tree(reply))
    for name, each in get_all_nested_objects(reply).items():
        store.put(name, each.deflate())
    superlink_data.look_after(database)

    def size() -> int:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return database.stat().st_size

    assert size() > 30 * MEGABYTE
    store.delete(reply.object_id)
    assert len(store) == 0
    assert (size() < MEGABYTE) == prepared


def test_the_log_of_changes_is_cut(tmp_path, monkeypatch):
    database = tmp_path / "superlink.db"
    superlink_data.prepare(database)
    monkeypatch.setattr(superlink_data, "_MOST_LOG", MEGABYTE)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("CREATE TABLE objects (content BLOB)")
        connection.execute("INSERT INTO objects VALUES (zeroblob(?))", (5 * MEGABYTE,))
        connection.commit()
        log = tmp_path / "superlink.db-wal"
        assert log.stat().st_size > 5 * MEGABYTE
        superlink_data.look_after(database)
        assert log.stat().st_size == 0


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_named_by_server_and_run(tmp_path, monkeypatch, caplog):
    database = tmp_path / "superlink.db"
    request = httpx.Request("POST", "https://127.0.0.1:1/v1/runtime/push-object")
    failed = httpx.HTTPStatusError("500", request=request, response=httpx.Response(500, request=request))
    monkeypatch.setenv(link.DATABASE, str(database))
    assert "Flower's SuperLink failed with HTTP status 500; server.log" in link.reason(failed)
    assert "has not answered for 300 s (ConnectError: refused)" in link.reason(httpx.ConnectError("refused"))
    assert link.reason(ValueError("x")) == ""
    superlink_data.look_after(database)
    assert not caplog.records
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100 << 20, 97 << 20, 3 << 20))
    says = f"the disk of the server's database is full: {tmp_path} has 3 MB left; make room there"
    assert link.reason(failed) == f"{says}, and resume the run"
    superlink_data.look_after(database)
    assert says in caplog.text


def test_a_database_that_cannot_be_used_is_one_sentence(tmp_path):
    database = tmp_path / "superlink.db"
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(
        RunError, match=r"superlink\.db: the SuperLink's database cannot be used: file is not a database"
    ):
        superlink_data.prepare(database)
