"""Flower's ClientApp: hands each message to the node's resident worker, or answers it here if there is none.

Flower starts a process for each message, and this process imports this file. Its top therefore imports nothing heavy.
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
    """Answer with this client's rank, alpha and number of training examples."""
    return _answer("describe", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round, or measure a statistic, from the server's adapter."""
    return _answer("train", message, context)


@app.train("project")
def project(message: Message, context: Context) -> Message:
    """Answer the second question of a round: what was trained, on the server's bases."""
    return _answer("project", message, context)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Answer with this client's public keys for a secure sum."""
    return _answer("keys", message, context)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Answer with shares of this client's secrets, encrypted for its neighbours."""
    return _answer("shares", message, context)


@app.query("open")
def opened(message: Message, context: Context) -> Message:
    """Answer with this client's shares of others' secrets, by which a secure sum is unmasked."""
    return _answer("open", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the server's adapter on this client's own test rows."""
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
    """The answer, computed by the worker or in this process; an error if the server no longer waits for it."""
    socket = context.node_config.get("worker")
    try:
        if socket:
            from .worker.caller import ask

            return ask(str(socket), task, message.content, context, watch)
        from .answering.dispatch import answer as here

        with listen(watch.check):
            return here(task, message.content, context)
    except vigil.Over as over:
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{task} was given up: {over}")


def _process_began() -> float:
    """The time at which this process started, in seconds since 1970; a message's cost is counted from then on."""
    return psutil.Process().create_time()


def _told(context: Context) -> AbstractContextManager[None]:
    """Write events to a log in the node's state folder; a simulation has listeners, and one log for all clients."""
    state = context.node_config.get("state")
    if has_listeners() or not state:
        return nullcontext()
    path = Path(str(state)) / journal.NAME
    return journal.journal_to(path, echo=True, most=rotation.MOST_BYTES, node=context.node_id)
