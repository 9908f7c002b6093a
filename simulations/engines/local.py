"""The in-process engine: the ServerApp and all clients in one process, where several clients can train as one batch."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch.profiler import record_function

from fedlora.config import Scalar

SERVER = 1  # Flower's own id of the SuperLink
WINDOW = 16
# Messages without a model that the server should have open at a time, such as the question who a client is.
SMALL_WINDOW = 1024


class Cohorts(Protocol):
    """The functions of `clients.answering.together`, which train several clients as one batch."""

    def how_many(self, context: Context) -> int:
        """The number of clients like this one to train at once."""
        ...

    def train(self, requests: Sequence[tuple[RecordDict, Context]]) -> list[RecordDict | Error]:
        """The answers to the clients' training messages, in order."""
        ...

    def describe(self, requests: Sequence[tuple[RecordDict, Context]]) -> list[RecordDict | Error]:
        """The answers to the question who the clients are, in order."""
        ...


class NodeConfigs(Sequence[Mapping[str, Scalar]]):
    """The configs of many nodes, each made when it is asked for.

    Args:
        count: number of nodes.
        make: makes the config of a node, by its place from 0.
    """

    def __init__(self, count: int, make: Callable[[int], Mapping[str, Scalar]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._count:
            raise IndexError(place)
        return self._make(place)


class LocalGrid(Grid):
    """A grid whose clients run in this process, at the moment when their replies are pulled.

    A client that is never asked costs nothing: its context is made when it gets a message, and kept only if the client
    leaves something in its state.

    Args:
        client_app: handles every message.
        node_configs: the config of each client's node, read again for each message. Since server and clients belong
            to one user, `allow-files` is true and `plugins` is "any" if a config does not set them.
        run_config: the run's configuration, for each client's context.
        run_id: number of this run.
        cohorts: trains several clients as one batch, in place of the ClientApp.

    Attributes:
        window: the number of training messages that the server should have open at a time. More messages would only
            wait here and cost memory.
        simulated: the clients are of this machine's user, whose rows they have.
    """

    simulated = True

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: dict[str, Scalar],
        run_id: int,
        cohorts: Cohorts | None = None,
    ) -> None:
        self._app, self._run_id, self._cohorts = client_app, run_id, cohorts
        self.window = WINDOW
        self._node_configs, self._run_config = node_configs, run_config
        self._contexts: dict[int, Context] = {}  # of clients that have left something in their state
        self._waiting: dict[str, Message] = {}
        # Message() takes its sender from TaskIdentity, which Flower sets only in processes that it starts itself.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER, 0

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("a local grid belongs to one run")

    @property
    def run(self) -> Run:
        raise NotImplementedError("a local run has no Flower run record")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(SERVER + 1, SERVER + 1 + len(self._node_configs))

    def window_for(self, kind: str) -> float:
        """The number of messages of one of Flower's types that the server should have open at a time."""
        return SMALL_WINDOW if kind == MessageType.QUERY else self.window

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of these clients that still waits, and others with it if they train as one batch.

        Returns:
            Their replies.
        """
        waiting = [self._waiting[known] for known in message_ids if known in self._waiting]
        if not waiting:
            return []
        with record_function("fedlora/clients"):
            return self._answered(waiting)

    def _answered(self, waiting: list[Message]) -> list[Message]:
        chosen, kind = waiting[:1], waiting[0].metadata.message_type
        of_kind = [message for message in waiting if message.metadata.message_type == kind]
        if self._cohorts is not None and kind == MessageType.QUERY:
            return self._described(of_kind)
        if self._cohorts is not None and kind == MessageType.TRAIN:
            self.window = max(WINDOW, size := self._cohorts.how_many(self._context(chosen[0])))
            chosen = of_kind[:size]
        for message in chosen:
            del self._waiting[message.metadata.message_id]
        if self._cohorts is None or len(chosen) == 1:
            return [self._run_client(message) for message in chosen]
        contexts = [self._context(message) for message in chosen]
        answers = self._cohorts.train([(m.content, context) for m, context in zip(chosen, contexts, strict=True)])
        self._keep(contexts)
        return [Message(answer, reply_to=message) for message, answer in zip(chosen, answers, strict=True)]

    def _described(self, chosen: list[Message]) -> list[Message]:
        assert self._cohorts is not None
        for message in chosen:
            del self._waiting[message.metadata.message_id]
        answers = self._cohorts.describe([(message.content, self._context(message)) for message in chosen])
        return [Message(answer, reply_to=message) for message, answer in zip(chosen, answers, strict=True)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _context(self, message: Message) -> Context:
        return self.context(message.metadata.dst_node_id)

    def context(self, node: int) -> Context:
        """The context of a node's client."""
        if node in self._contexts:
            return self._contexts[node]
        node_config = {"allow-files": True, "plugins": "any", **self._node_configs[node - SERVER - 1]}
        return Context(self._run_id, node, node_config, RecordDict(), self._run_config)

    def _keep(self, contexts: Iterable[Context]) -> None:
        self._contexts |= {context.node_id: context for context in contexts if context.state}

    def _run_client(self, message: Message) -> Message:
        context = self._context(message)
        try:
            reply = self._app(message, context)
            self._keep([context])
            return reply
        except Exception:  # as in Flower, a client that crashes fails its own message and nothing else
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc()), reply_to=message)
