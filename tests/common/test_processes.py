"""What processes are told before they load torch, and how signals stop what runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fedlora.common import processes


def environment_of(**own: str) -> dict[str, str]:
    """What the `fedlora` command's process knows of OpenMP before it loads torch."""
    code = (
        "import fedlora.cli.main, json, os, sys; assert 'torch' not in sys.modules; print(json.dumps(dict(os.environ)))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=clean | own, capture_output=True, text=True, check=True)
    return {name: value for name, value in json.loads(done.stdout).items() if name in names}


def test_threads_that_wait_sleep_unless_the_user_says_otherwise() -> None:
    assert environment_of() == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    assert environment_of(OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}
    assert environment_of(GOMP_SPINCOUNT="1000")["GOMP_SPINCOUNT"] == "1000"


def test_processes_that_compute_at_once_share_one_pools_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(8)}, raising=False)
    assert [processes.share_of_cores(count) for count in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setattr(os, "environ", {})
    processes.share_cores()
    assert "OMP_NUM_THREADS" not in os.environ
    processes.share_cores(4)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    processes.share_cores(8)
    assert os.environ["OMP_NUM_THREADS"] == "2"  # as set before


def test_a_signal_that_a_finalizer_swallows_is_heard_all_the_same() -> None:
    class Ends:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook
    with processes.stopped_by_signals() as told:
        Ends()  # Python drops what is raised within it
        assert told.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    assert sys.unraisablehook is before


def test_a_second_signal_disturbs_nothing_unless_the_first_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with processes.stopped_by_signals() as told:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert told.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(processes, "_LOST_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.stopped_by_signals() as told:
            signal.raise_signal(signal.SIGHUP)
            assert not told.number
    finally:
        signal.signal(signal.SIGHUP, before)
