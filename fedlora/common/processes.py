"""Starts child processes and makes sure that they end with their parent; stops processes by their pid."""

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
_LOST_SECONDS = 30.0  # if the block has not ended after this time, its KeyboardInterrupt was lost
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def share_cores(processes: int = 1) -> None:
    """Set environment variables for OpenMP, for this process and its children, before they load torch.

    With them, threads that wait for others sleep. By default, OpenMP's threads wait in a loop and so take the cores
    from other processes and from other pools of threads in this one. If several processes compute at the same time,
    each gets its share of the cores. Variables that the user has set are not changed.

    Args:
        processes: number of processes that compute at the same time.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _PASSIVE.items():
            os.environ.setdefault(name, value)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(processes)))


def share_of_cores(processes: int) -> int:
    """The number of threads for each of several processes that share the cores which this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // processes)


@dataclass
class Told:
    """The signal that told this process to stop.

    Attributes:
        number: number of the signal; 0 if there was none.
    """

    number: int = 0


@contextmanager
def stopped_by_signals() -> Iterator[Told]:
    """Within the block, SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does.

    A second signal has no effect, so that it cannot disturb the end, unless it comes so much later that the first one
    must have been lost. Signals that this process ignored from its start, for instance by nohup, stay ignored, except
    SIGTERM. Python drops exceptions within a finalizer or a callback of the garbage collector; a signal that arrives
    there is sent once more.
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
    """Start a program in a session of its own, so that Ctrl-C reaches only this process, which then stops the program.

    On Linux, the program also gets SIGTERM when this process is killed.
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
    """Called in a child process: make it get SIGTERM when its parent dies, however that happens (on Linux only)."""
    if _libc:
        _go_with(parent)


def call_with_parent(parent: int, target: str, *given: Any) -> None:
    """Called in a new process: `end_with(parent)`, and only then import a module and call its function.

    Args:
        parent: pid of the parent.
        target: the function, as "package.module:name"; its module may take long to import.
        given: the function's arguments.
    """
    end_with(parent)
    module, _, name = target.partition(":")
    getattr(import_module(module), name)(*given)


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all of its descendants."""
    stop(process.pid)
    process.wait(timeout=_STOP_SECONDS)


def stop_recorded(file: Path, word: str, kill: bool = False) -> None:
    """Stop the process whose pid is in a file, if it runs, is this user's, and has `word` in its command line.

    Args:
        file: file with the pid.
        word: a word of the process's command line.
        kill: kill the process without asking it to stop, since a process that hangs would not react.
    """
    with suppress(OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        pid = int(file.read_text())
        process = psutil.Process(pid)
        if word in process.cmdline() and process.username() == psutil.Process().username():
            stop(pid, kill)


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(pid: int, kill: bool = False) -> None:
    """Stop the process of this pid and all of its descendants, if there is such a process.

    Args:
        pid: pid of the process.
        kill: kill the processes without asking them to stop.
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
    """Called in the child, between fork and exec or later: make it get SIGTERM when the parent dies."""
    assert _libc is not None
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
