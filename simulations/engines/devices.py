"""The local engine on several devices: a process for each device trains and evaluates its share of the clients.

Clients are assigned to the devices in turn, for the whole run. The folds in a process are then always those of its
clients, and a client's state on disk has only one writer. A process sends its events and log lines through the same
pipe as its answers, in order; this process passes them on while it waits for answers.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.common.errors import ConfigError, RunError
from fedlora.common.events import emit, listen
from fedlora.common.processes import call_with_parent, share_cores, share_of_cores
from fedlora.config import Scalar

from .local import SERVER, WINDOW, Cohorts, LocalGrid, NodeConfigs

_STOP_SECONDS = 10.0
_CUDA = re.compile(r"cuda:([0-9]{1,4})", re.ASCII)
Requests = Sequence[tuple[RecordDict, Context]]
_log = logging.getLogger("fedlora")


def devices_of(text: str) -> tuple[str, ...]:
    """The devices that `--devices` names, such as "cuda:0,cuda:1" or "cpu,cpu"; auto: all CUDA devices, or the CPU.

    Raises:
        ConfigError: a name has another form, or the device does not exist.
    """
    import torch

    count = torch.cuda.device_count()
    if text.strip() == "auto":
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
    found: list[str] = []
    for name in (piece.strip() for piece in text.split(",")):
        index = _CUDA.fullmatch(name)
        if index is None and name != "cpu":
            raise ConfigError(
                f"--devices {text!r}: {name!r} is not a device, expected auto, or cpu and cuda:N, such as cuda:0,cuda:1"
            )
        if index and int(index[1]) >= count:
            raise ConfigError(
                f"--devices {text!r}: {name} does not exist, torch sees {count} CUDA devices; use auto or cpu"
            )
        found.append(f"cuda:{int(index[1])}" if index else name)
    return tuple(found)


class Child:
    """The process for one device. It is started when it first gets work, and again after it has died.

    Args:
        device: name of the device, as for `model.device`.
        threads: number of torch's threads in the process.
        log: file for the process's output.
    """

    def __init__(self, device: str, threads: int, log: Path) -> None:
        self.device = device
        self._threads, self._log = threads, log
        self._process: Any = None
        self._pipe: Any = None

    @property
    def pipe(self) -> Connection:
        """The pipe through which the process answers."""
        return self._pipe

    def ask(self, task: str, requests: Requests) -> None:
        """Give the process work. It must have none at this time.

        Args:
            task: "train", "evaluate", or "size", which asks for the number of clients like this one to train at once.
            requests: content and context of each message.
        """
        if self._process is None or not self._process.is_alive():
            self.stop()
            self._start()
        with suppress(OSError):  # the process died, which `hear` reports
            self.pipe.send((task, requests))

    def hear(self) -> tuple[str, Any]:
        """The next message of the process.

        Returns:
            One of ("event", (kind, facts)), ("log", (level, text)), ("size", int) and ("answers", list).

        Raises:
            RunError: the process died.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(_STOP_SECONDS)
            code = self._process.exitcode
            self.stop()
            raise RunError(
                f"the process on {self.device} died with exit code {code}, out of memory or killed; its output is in "
                f"{self._log.parent.name}/{self._log.name} of the run's folder"
            ) from None

    def stop(self) -> None:
        """Stop the process at once; its present work is lost."""
        if self._process is None:
            return
        if self._process.pid is not None:  # it is None if the start was interrupted
            self._process.terminate()
            self._process.join(_STOP_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process.close()
        self.pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        given = (os.getpid(), f"{__name__}:serve", theirs, self._threads, self._log)
        self._process = context.Process(target=call_with_parent, args=given, name=f"fedlora {self.device}", daemon=True)
        with _no_ctrl_c(), _no_main():
            self._process.start()
        theirs.close()


class DevicesGrid(LocalGrid):
    """A grid whose clients run in other processes, one for each device. As a context manager, it stops them in the end.

    If a process dies, the messages that it was working on fail, as if their clients had crashed, and it is started
    again for the next message. Questions for a client's description need no base model, and are answered in this
    process.

    Args:
        client_app: answers the messages that need no base model.
        node_configs: the config of each client's node.
        run_config: the run's configuration, for each client's context.
        run_id: number of this run.
        cohorts: answers the question who the clients are, for many at once, in place of the ClientApp.
        devices: names of devices, as for `model.device`; a name may occur several times.
        logs: folder for the processes' output.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: dict[str, Scalar],
        run_id: int,
        cohorts: Cohorts | None = None,
        *,
        devices: Sequence[str],
        logs: Path,
    ) -> None:
        placed = NodeConfigs(len(node_configs), lambda i: {**node_configs[i], "device": devices[i % len(devices)]})
        super().__init__(client_app, placed, run_config, run_id, cohorts)
        self.window = WINDOW * len(devices)
        share_cores(len(devices))
        threads = share_of_cores(len(devices))
        self._children = [Child(name, threads, logs / f"device-{i}.txt") for i, name in enumerate(devices)]
        self._at: dict[Child, list[Message]] = {}
        self._answers: dict[str, Message] = {}  # to be pulled; some came while others were waited for
        self._sizes: dict[Child, int] = {}
        self._told: set[str] = set()

    def __enter__(self) -> DevicesGrid:
        devices = ", ".join(child.device for child in self._children)
        _log.info("clients are divided among %s, with a process for each device", devices)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.stop()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give these messages to the devices that are free, wait for an answer, and return all answers so far."""
        asked = list(message_ids)
        waiting = [self._waiting[known] for known in asked if known in self._waiting]
        here = [m for m in waiting if m.metadata.message_type not in (MessageType.TRAIN, MessageType.EVALUATE)]
        if here:
            return super().pull_messages([message.metadata.message_id for message in here])
        while not (there := [known for known in asked if known in self._answers]) and self._is_open(asked):
            self._hand_out(asked)
            replies = self._heard(asked)
            self._answers |= {r.metadata.reply_to_message_id: r for r in replies if r.metadata.ttl > 0}  # else too late
        return [self._answers.pop(known) for known in there]

    def _is_open(self, asked: Sequence[str]) -> bool:
        at = {message.metadata.message_id for messages in self._at.values() for message in messages}
        return any(known in self._waiting or known in at for known in asked)

    def _hand_out(self, asked: Sequence[str]) -> None:
        for child in self._children:
            if child in self._at or not (chosen := self._taken(child, asked, 1)):
                continue
            self._at[child] = chosen
            task = "size" if chosen[0].metadata.message_type == MessageType.TRAIN else "evaluate"
            child.ask(task, self._requests(chosen))

    def _taken(self, child: Child, asked: Sequence[str], most: int, kind: str = "") -> list[Message]:
        """The first `most` messages that wait for this process; if a kind is given, only messages of this kind."""
        waiting = [self._waiting[known] for known in asked if known in self._waiting]
        taken = [
            message
            for message in waiting
            if self._home(message) is child and kind in ("", message.metadata.message_type)
        ][:most]
        for message in taken:
            del self._waiting[message.metadata.message_id]
        return taken

    def _home(self, message: Message) -> Child:
        """The process of the device on which a message's client lives."""
        return self._children[(message.metadata.dst_node_id - SERVER - 1) % len(self._children)]

    def _heard(self, asked: Sequence[str]) -> list[Message]:
        """Wait until a working process says something; return the replies among what they said."""
        replies: list[Message] = []
        at_work = {child.pipe: child for child in self._at}
        for pipe in connection.wait(list(at_work)):
            child = at_work[pipe]  # pyright: ignore[reportArgumentType]
            what: str
            said: Any
            try:
                what, said = child.hear()
            except RunError as error:
                died = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
                what, said = "answers", [died] * len(self._at[child])
            if what == "event":
                emit(said[0], **said[1])
            elif what == "log":
                self._tell(*said)
            elif what == "size":
                self._sizes[child] = said
                self.window = max(WINDOW * len(self._children), sum(self._sizes.values()))
                self._at[child] += self._taken(child, asked, said - 1, MessageType.TRAIN)
                child.ask("train", self._requests(self._at[child]))
            else:
                messages = self._at.pop(child)
                replies += [Message(answer, reply_to=m) for m, answer in zip(messages, said, strict=True)]
        return replies

    def _tell(self, level: int, text: str) -> None:
        """Log a line of a process. A line that is no warning is logged once, even if all processes send it."""
        if level > logging.INFO or text not in self._told:
            self._told.add(text)
            _log.log(level, "%s", text)

    def _requests(self, messages: Iterable[Message]) -> Requests:
        return [(message.content, self._context(message)) for message in messages]


@contextmanager
def _no_main() -> Iterator[None]:
    """A process that is started within the block does not run the script of this process again."""
    with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
        yield


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """A process that is started within the block never gets Ctrl-C, not even while it imports modules.

    This process gets it after the block. On Windows, which has no such mask, the block does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first process start would start it, and remove the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Told(logging.Handler):
    """In a child process: sends all log lines to the parent."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send(("log", (record.levelno, record.getMessage())))


def serve(pipe: Connection, threads: int, log: Path) -> None:
    """The main function of a child process: answer until the parent is gone, ignore Ctrl-C, and print to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from ...clients.answering import dispatch, together

    torch.set_num_threads(threads)
    _log.setLevel(logging.INFO)
    _log.addHandler(_Told(pipe))
    with suppress(EOFError), listen(lambda kind, facts: pipe.send(("event", (kind, facts)))):
        while True:
            task, requests = pipe.recv()
            if task == "size":
                pipe.send(("size", together.how_many(requests[0][1])))
            elif len(requests) > 1:
                pipe.send(("answers", together.train(requests)))
            else:
                pipe.send(("answers", [dispatch.answer(task, *request) for request in requests]))
