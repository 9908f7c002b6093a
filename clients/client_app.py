"""Flower's ClientApp: hands each message to the node's resident worker where it has one, else answers it here.

Flower starts a process for each message, which imports this file: nothing heavy is imported on top of it.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.common import rotation
from fedlora.common.events import emit, has_listeners, listen
from fedlora.results import journal

from .answering import vigil

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Rank, alpha and number of training examples of this client."""
    return _answer("describe", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round's task from the server's start."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The server's adapter on this client's own test rows."""
    return _answer("evaluate", message, context)


def _answer(task: str, message: Message, context: Context) -> Message:
    with _told(context):
        began = time.perf_counter()
        with vigil.watched_over(message, context.node_config, context.node_id) as watch:
            answer = _worked_out(task, message, context, watch)
        error = {"error": answer.reason} if isinstance(answer, Error) else {}
        seconds = {"seconds": time.perf_counter() - began, "process-seconds": time.time() - _process_began()}
        emit("message-answered", task=task, run=context.run_id, **seconds, **error)
    return Message(answer, reply_to=message)


def _worked_out(task: str, message: Message, context: Context, watch: vigil.Vigil) -> RecordDict | Error:
    """By the worker, or in this process; an error where nobody waits for it any more."""
    socket = context.node_config.get("worker")
    try:
        if socket:
            from .worker.caller import ask

            return ask(str(socket), task, message.content, context, watch)
        from .answering.dispatch import answer as here

        with listen(watch.check):
            return here(task, message.content, context)
    except vigil.Over as over:
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{task} was left: {over}")


def _process_began() -> float:
    """What a message costs begins with its process."""
    return psutil.Process().create_time()


def _told(context: Context) -> AbstractContextManager[None]:
    """A node's own log of events, in its state folder; a simulation, which has listeners, keeps one for all."""
    state = context.node_config.get("state")
    if has_listeners() or not state:
        return nullcontext()
    path = Path(str(state)) / journal.NAME
    return journal.journal_to(path, echo=True, most=rotation.MOST_BYTES, node=context.node_id)
