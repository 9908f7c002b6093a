"""Runs Flower's programs of one server or node until one of them ends, in a folder of their own.

Apps run under a SuperExec that shares a secret with its SuperLink or SuperNode. Flower's Runtime API, which hands out
the apps, is on the same port as everything else, and without the secret would answer anyone who reaches the port.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.common import processes
from fedlora.common.errors import ConfigError
from fedlora.common.rotation import Log

from . import flower_programs

_LOOK_SECONDS = 30.0  # pause between two calls of `meanwhile`
_LONGEST_FOLDER = 70  # largest number of characters of a folder for sockets


class Programs:
    """Flower's programs of one server or node. Their output is printed and logged; the context's end stops them all."""

    def __init__(self, home: Path, name: str) -> None:
        self._home, self.log = home, home / f"{name}.log"
        self._environment = flower_programs.environment(home / "flwr")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: dict[str, threading.Thread] = {}
        self._lines = Log(self.log)

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            processes.stop_tree(process)
        for reader in self._readers.values():
            reader.join(timeout=5)

    def start(
        self, command: Sequence[str], more: Mapping[str, str] | None = None, name: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start a program of this Python's folder.

        Args:
            command: the program and its arguments.
            more: further environment variables.
            name: by which `wait` says that it ended; that of the program when left out.
        """
        # Apps can import from the working folder, which therefore has only files that are made here.
        words = [flower_programs.program(command[0]), *command[1:]]
        process = processes.start(words, self._home, {**self._environment, **(more or {})}, subprocess.PIPE)
        reader = threading.Thread(target=self._copy, args=(process,), daemon=True)
        reader.start()
        self._running[name or command[0]], self._readers[name or command[0]] = process, reader
        return process

    def _copy(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.write(line)
                print(line.decode(errors="replace"), end="", flush=True)

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[str, str]:
        """Wait until a program ends, and return its name and its last error; call `meanwhile` from time to time."""
        called = time.monotonic()
        while all(process.poll() is None for process in self._running.values()):
            time.sleep(0.2)
            if time.monotonic() - called > _LOOK_SECONDS:
                meanwhile()
                called = time.monotonic()
        ended = next(name for name, process in self._running.items() if process.poll() is not None)
        self._readers[ended].join(timeout=5)
        return ended, flower_programs.reason_of(self.log.read_text(errors="replace"))


@contextmanager
def own_folder(state: Path) -> Iterator[Path]:
    """Lock a state folder within the block, so that no other server or node uses it."""
    home = state.expanduser().resolve()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(home / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"--state {home}: another server or node uses this folder; give each its own") from None
    except OSError as error:
        raise ConfigError(f"--state {home}: cannot be written: {error}") from None
    try:
        yield home
    finally:
        lock.release()


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder for sockets, whose paths may have at most about 100 characters: not one that the user chose."""
    short = None if len(tempfile.gettempdir()) <= _LONGEST_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir=short, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def superexec_options(secret: Path) -> list[str]:
    return ["--superexec-auth-secret-file", str(secret), "--parent-pid", str(os.getpid())]


def fresh_secret(home: Path) -> Path:
    """Write a new secret for this server or node and its SuperExec; return its file."""
    path = home / "superexec-secret"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.urandom(32))
    return path
