"""Processes that this one starts, and stops by pid: none outlives what it was started for."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

_STOP_SECONDS = 10.0
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}  # of GCC's and Intel's OpenMP
_AGAIN_SECONDS = 0.05
_LOST_SECONDS = 30.0  # what was told to stop so long ago did not hear it
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def share_cores(processes: int = 1) -> None:
    """What this process, and those that it starts, are to know before they load torch; what the user has set stays.

    Threads that wait for others sleep: OpenMP's would spin, and take the cores from whatever else computes, other
    processes and other pools of threads in this one. Of several processes that compute at once, each gets its share of
    the cores.

    Args:
        processes: that compute at once.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _PASSIVE.items():
            os.environ.setdefault(name, value)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(processes)))


def share_of_cores(processes: int) -> int:
    """Threads for each of several processes that compute at once, on the cores that this one may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // processes)


@dataclass
class Told:
    """The signal that told this process to stop.

    Attributes:
        number: of the signal; 0 for none.
    """

    number: int = 0


@contextmanager
def stopped_by_signals() -> Iterator[Told]:
    """SIGTERM and a closed terminal stop what is within the block in order, as Ctrl-C does: by KeyboardInterrupt.

    A second signal does not disturb that, unless it comes much later, when the first was lost. Signals that this
    process was started to ignore, as by nohup, stay ignored, but for SIGTERM. Python drops what is raised within a
    finalizer or a callback of the garbage collector: a signal that came just then is sent once more.
    """
    told, last, dropped = Told(), 0.0, sys.unraisablehook

    def tell(number: int, _: object) -> None:
        nonlocal last
        if not told.number or time.monotonic() - last > _LOST_SECONDS:
            told.number, last = number, time.monotonic()
            raise KeyboardInterrupt

    def again(what: sys.UnraisableHookArgs) -> None:
        nonlocal last
        if what.exc_type is not KeyboardInterrupt or not told.number:
            dropped(what)
            return
        last = -math.inf
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), told.number)).start()

    wanted = [number for name in ("SIGINT", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    wanted = [signal.SIGTERM, *(number for number in wanted if signal.getsignal(number) != signal.SIG_IGN)]
    before = {number: signal.signal(number, tell) for number in wanted}
    sys.unraisablehook = again
    try:
        yield told
    finally:
        sys.unraisablehook = dropped
        for number, handler in before.items():
            signal.signal(number, handler)


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str], output: Any) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own: Ctrl-C is for this process, which then stops all in order.

    On Linux it is told to stop too when this process is killed.
    """
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=functools.partial(_go_with, os.getpid()) if _libc else None,  # noqa: PLW1509 - one call
    )


def end_with(parent: int) -> None:
    """From within a process: be told to stop when its parent dies, however it dies. Linux alone can do it."""
    if _libc:
        _go_with(parent)


def call_with_parent(parent: int, target: str, *given: Any) -> None:
    """In a new process: call a function, and be told to stop when the parent dies, also while its module is imported.

    Args:
        parent: its pid.
        target: the function as "package.module:name", whose module may take long to import.
        given: what the function gets.
    """
    end_with(parent)
    module, _, name = target.partition(":")
    getattr(import_module(module), name)(*given)


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and everything that it started."""
    stop(process.pid)
    process.wait(timeout=_STOP_SECONDS)


def stop_recorded(file: Path, word: str, kill: bool = False) -> None:
    """Stop the process whose pid is in a file, if it is there, this user's, and has this word in its command line.

    Args:
        file: holds the pid.
        word: of its command line.
        kill: without asking it first: a process that hangs does not hear.
    """
    with suppress(OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        pid = int(file.read_text())
        process = psutil.Process(pid)
        if word in process.cmdline() and process.username() == psutil.Process().username():
            stop(pid, kill)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(pid: int, kill: bool = False) -> None:
    """Stop the process of this pid and everything that it started; nothing happens where there is none.

    Args:
        pid: the process.
        kill: without asking it first.
    """
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    alive = family
    if not kill:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS)


def _go_with(parent: int) -> None:
    """In the child, between fork and exec or later: SIGTERM when the parent dies, however it dies."""
    assert _libc is not None
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
