"""A run that was handed in is followed to its end, also where its server has none."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fedlora.common.errors import RunError
from fedlora.config import parse
from fedlora.deployment import flower_programs
from fedlora.deployment.flower_programs import Connection
from fedlora.results.run_folder import folder_of

GONE = {"error-message": "Connection refused"}


@dataclass(frozen=True)
class Scripted(Connection):
    """A server that takes a run, and then says of it what `says` makes."""

    says: Callable[[int], dict[str, Any]] = lambda times: GONE
    asked: list[str] = field(default_factory=list)

    def ask(self, *words: str, timeout: float = 120.0) -> dict[str, Any]:
        self.asked.append(words[0])
        return {"run-id": "7"} if words[0] == "run" else self.says(len(self.asked) - 1)

    def run(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, "a line\nthe last line\n", "")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    for name, seconds in (("_POLL_SECONDS", 0.01), ("_ASK_SECONDS", 0.05), ("_LOST_SECONDS", 0.4)):
        monkeypatch.setattr(flower_programs, name, seconds)


def followed(tmp_path: Path, says: Callable[[int], dict[str, Any]], resume: bool = False) -> Scripted:
    config = parse({"run.dir": str(tmp_path), "run.name": "n", "run.id": "one", "run.resume": resume})
    connection = Scripted("x", {}, tmp_path, "fed.example.org:9092", says)
    flower_programs.carry_out(config, tmp_path / "app", connection, log=None)
    return connection


def record(tmp_path: Path, **data: Any) -> Path:
    folder = folder_of(parse({"run.dir": str(tmp_path), "run.name": "n", "run.id": "one"}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"rounds": []} | data))
    return folder


def running(times: int) -> dict[str, Any]:
    return {"runs": [{"status": "running"}]}


def test_a_server_that_is_gone_for_good_ends_the_command(tmp_path):
    says = r"fed\.example\.org:9092 has not answered for \d+ s \(Connection refused\).*fedlora run --resume .*n/one"
    with pytest.raises(RunError, match=says):
        followed(tmp_path, lambda times: running(times) if times < 4 else GONE)


def test_a_server_that_comes_back_is_waited_for(tmp_path):
    seen = []

    def says(times: int) -> dict[str, Any]:
        seen.append(times)
        return GONE if times % 3 else ({"runs": [{"status": "finished:completed"}]} if times > 20 else running(times))

    followed(tmp_path, says)
    assert len(seen) > 20


def test_the_record_has_the_last_word_where_the_server_is_gone(tmp_path):
    record(tmp_path, status="interrupted")
    with pytest.raises(RunError, match=r"finished:interrupted: its server stopped it, or ended itself; continue with"):
        followed(tmp_path, lambda times: GONE)
    record(tmp_path, status="completed")
    followed(tmp_path, lambda times: GONE)


def test_a_run_whose_process_died_with_its_server_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_programs, "_LOST_SECONDS", 60.0)
    folder = record(tmp_path, status="running")
    with pytest.raises(RunError, match=r"does not answer, and the run's process has ended with it.*--resume .*n/one"):
        followed(tmp_path, lambda times: GONE)
    monkeypatch.setattr(flower_programs, "_LOST_SECONDS", 0.5)
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="has not answered for"):
        followed(tmp_path, lambda times: GONE)


def test_the_error_of_the_time_before_is_not_that_of_a_run_that_is_resumed(tmp_path):
    record(tmp_path, status="failed", error="of the time before")
    failed = {"runs": [{"status": "finished:failed"}]}
    with pytest.raises(RunError, match=r"ended as finished:failed: the last line$"):
        followed(tmp_path, lambda times: failed, resume=True)

    def fails_now(times: int) -> dict[str, Any]:
        record(tmp_path, status="failed", error="of now")
        return failed

    with pytest.raises(RunError, match="of now"):
        followed(tmp_path, fails_now, resume=True)


def test_a_command_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(flower_programs, "program", lambda name: "sleep")
    done = Connection("x", {"PATH": "/usr/bin:/bin"}, tmp_path).run("30", timeout=0.2)
    assert (done.returncode, done.stderr) == (1, "no answer within 0 s")


def test_a_server_that_takes_no_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "ask", lambda self, *words, timeout=0: {"error-message": "Server error '500'"})
    with pytest.raises(
        RunError, match=r"the server at fed\.example\.org:9092 did not accept the run: .*server\.log says why"
    ):
        followed(tmp_path, running)
