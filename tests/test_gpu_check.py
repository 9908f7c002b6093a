"""The check of a card, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from fedlora.common import processes

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.a" name="test_fine" time="0.1"/>
<testcase time="0.2"/>
<testcase classname="tests.a" name="test_elsewhere"><skipped message="is about the CPU"/></testcase>
<testcase classname="tests.b" name="test_wrong[x]"><failure message="RuntimeError: two devices&#10;more">long</failure>
</testcase>
<testcase classname="tests.b" name="test_broken"><error message="no fixture"/></testcase>
</testsuite></testsuites>"""


def check(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpu_check", *map(str, words)])
    return gpu_check.main()


def test_a_card_that_is_not_there_is_one_sentence(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    out = tmp_path / "found.json"
    assert check(monkeypatch, "--device", "cuda:1", "--out", out) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: --device = 'cuda:1', but torch ")
    assert said.err.count("\n") == 1
    assert not out.exists()


def test_a_report_becomes_counts_and_the_names_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert gpu_check.outcomes(tmp_path / "report.xml") == {
        "passed": 1,
        "skipped": 1,
        "failed": [
            {"test": "tests.b::test_wrong[x]", "says": "RuntimeError: two devices\nmore"},
            {"test": "tests.b::test_broken", "says": "no fixture"},
        ],
    }


def test_a_failed_test_and_what_was_not_measured_fail_the_check(capsys) -> None:
    tests = {"passed": 3, "skipped": 0, "failed": [], "finished": True, "seconds": 1.0}
    found = {"device": "cuda:0", "tests": tests}
    assert gpu_check._tell(found, Path("x")) == 0
    assert gpu_check._tell(found | {"benchmarks": {"left-out": {"mixed": "the time was over"}}}, Path("x")) == 1
    failed = tests | {"failed": [{"test": "tests.b::test_wrong", "says": "RuntimeError: two devices\nmore"}]}
    assert gpu_check._tell(found | {"tests": failed}, Path("x")) == 1
    assert gpu_check._tell(found | {"tests": tests | {"passed": 0}}, Path("x")) == 1
    said = capsys.readouterr().out
    assert "failed: tests.b::test_wrong: RuntimeError: two devices\n" in said
    assert "not measured: mixed: the time was over\n" in said


def test_a_process_that_hears_nothing_is_ended_when_its_time_is_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "_ENDING", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    with (tmp_path / "said").open("w+") as said:
        process = processes.start([sys.executable, "-c", deaf], tmp_path, {}, said)
        while not (tmp_path / "said").read_text():
            time.sleep(0.01)
        assert gpu_check._wait(process, 0.1)[1] is False
    assert process.poll() is not None


@pytest.mark.slow
def test_some_tests_are_run_and_recorded(tmp_path: Path) -> None:
    """Of a folder with tests of its own: one fails, one has no end."""
    (tmp_path / "test_mine.py").write_text(
        "import os, time\n\n\n"
        "def test_fine(): assert os.environ['FEDLORA_TEST_DEVICE'] == 'cpu'\n\n\n"
        "def test_wrong(): assert 1 == 2\n\n\n"
        "def test_endless(): time.sleep(600)\n"
    )
    words = ["--device", "cpu", "--no-benchmarks", "--workers", "1", "--tests", str(tmp_path / "test_mine.py")]
    words += ["--seconds", "40", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *words],
        cwd=gpu_check.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    tests = json.loads((tmp_path / "found.json").read_text())["tests"]
    assert tests["passed"] == 1
    assert [failure["test"].split("::")[-1] for failure in tests["failed"]] == ["test_wrong"]
    assert not tests["finished"]
    assert "did not come to their end" in done.stdout
