"""Logs: nothing is lost at a start, and nothing grows for ever."""

import threading

from fedlora.common import rotation
from fedlora.common.events import emit
from fedlora.results import journal


def test_a_log_that_is_large_becomes_the_first_of_a_few(tmp_path):
    log = tmp_path / "node.log"
    for number in range(7):
        log.write_text(f"{number}" * 100)
        rotation.rotate(log, most=50, older=3)
        assert not log.exists()
    left = {path.name: path.read_text()[0] for path in tmp_path.iterdir()}
    assert left == {"node.log.1": "6", "node.log.2": "5", "node.log.3": "4"}
    log.write_text("short")
    rotation.rotate(log, most=50)
    assert log.read_text() == "short"
    rotation.rotate(tmp_path / "none", most=0)


def test_a_start_keeps_what_was_logged_before(tmp_path):
    """As a program that is started again and again for what its log says."""
    path = tmp_path / "server.log"
    for line in (b"why it ended\n", b"second\n"):
        log = rotation.Log(path)
        log.write(line)
    assert path.read_bytes() == b"second\n"
    assert (tmp_path / "server.log.1").read_bytes() == b"why it ended\n"


def test_lines_of_several_threads_are_whole_and_bounded(tmp_path):
    log = rotation.Log(tmp_path / "x.log", most=2000, older=2)
    threads = [threading.Thread(target=lambda: [log.write(b"a" * 99 + b"\n") for _ in range(200)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) <= 3 * 2100
    assert {line for path in files for line in path.read_bytes().splitlines()} == {b"a" * 99}


def test_a_nodes_events_rotate_and_a_runs_do_not(tmp_path):
    for name, most in (("node", 3000), ("run", 0)):
        with journal.journal_to(tmp_path / name / journal.NAME, most=most):
            for number in range(100):
                emit("client-done", client_id=number, metrics={})
    assert len(journal.read(tmp_path / "run" / journal.NAME)) == 100
    assert not (tmp_path / "run" / "events.jsonl.1").exists()
    files = sorted((tmp_path / "node").iterdir())
    assert len(files) > 1
    assert all(path.stat().st_size < 3300 for path in files)
    assert journal.read(tmp_path / "node" / journal.NAME)[-1]["client_id"] == 99
