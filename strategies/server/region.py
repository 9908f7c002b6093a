"""The nodes below an edge: carries a server's questions to them, and their answers back, each under its client's id.

An edge is a node towards the server above it and a server towards the nodes of its region. The server above knows the
region's clients one by one, as those of a node that hosts them, and so may be an edge itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from flwr.app import Error, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora.adapters import without_values
from fedlora.common.errors import FedLoraError, RunError, WireError
from fedlora.common.events import emit
from fedlora.config import Config
from fedlora.exchange import Broadcast, parts, secure_messages, sketches, summed, wire
from fedlora.exchange.heads import HEAD

from .answers import Answer
from .mailbox import SMALL, Mailbox
from .roster import Meeting, Roster
from .summing import add_up

_LEAST_NEIGHBOUR = 32  # bytes that a question of a secure sum has at least for each neighbour: a public key
# What is asked -> Flower's type of the message.
_KINDS = {
    "train": "train",
    "project": "train.project",
    "evaluate": "evaluate",
    "keys": "query.keys",
    "shares": "query.shares",
    "open": "query.open",
}


class Region:
    """The clients below one edge, in one run.

    Args:
        grid: carries the messages to the region's nodes.
        config: the run's configuration, with this edge's own deadlines; see `deployment.edge.sooner`.
        name: of the edge, for the record of the server above it and for messages.
        clients: the number of clients that the region has at most, and for which the first answer waits.
    """

    def __init__(self, grid: Grid, config: Config, name: str, clients: int) -> None:
        self._grid, self._name = grid, name
        self._config = replace(config, federation=replace(config.federation, clients=clients, min_clients=1))
        self._meeting: Meeting | None = None
        self._sent: dict[int, Broadcast] = {}  # in this round; between two questions without values

    def answer(self, task: str, content: RecordDict, check: Callable[[], None] = lambda: None) -> RecordDict | Error:
        """Ask those clients of the region that a message is for.

        Args:
            task: what is asked, as in the client's `single.answer`.
            content: the message's content; a part for each client, except for "describe", which all clients answer.
            check: called again and again while answers are waited for; what it raises ends the waiting.

        Returns:
            A part for each client that was asked: its answer, or its error. An error in place of all parts says that
            the edge itself cannot answer.
        """
        try:
            return self._introduced(content) if task == "describe" else self._asked(task, content, check)
        except FedLoraError as error:
            return Error(wire.REFUSED, f"the edge {self._name}: {error}")

    def _introduced(self, hello: RecordDict) -> RecordDict | Error:
        fingerprint = _fingerprint(hello)
        wire.check_hello(hello, fingerprint)
        try:
            roster = self._met(fingerprint)
        except RunError as error:  # nobody is there yet: to be asked again, as a node that is not there
            return _away(f"the edge {self._name}: {error}")
        infos = (replace(info, edges=(self._name, *info.edges)) for info in roster.infos.values())
        return parts.join({info.client_id: wire.encode_info(info, fingerprint) for info in infos})

    def _met(self, fingerprint: str) -> Roster:
        """Who is in the region now.

        Raises:
            RunError: nobody.
        """
        if self._meeting is None:
            # Whether classes have the names of most clients, the server above sees, which knows all.
            meeting = Meeting(self._grid, self._config, fingerprint, limit="--clients", compares=False)
            meeting.begin()
            self._meeting = meeting
        else:
            self._meeting.welcome()
        return self._meeting.roster

    def _asked(self, task: str, content: RecordDict, check: Callable[[], None]) -> RecordDict:
        asked = parts.split(content, "the server")
        questions = {client: part for client, part in asked.items() if isinstance(part, RecordDict)}
        if len(questions) < len(asked):
            raise WireError("the server sent an error in place of a client's message")
        first = next(iter(questions.values()))
        fingerprint, number = _fingerprint(first), first.config_records[HEAD].get("round", 0)
        roster = self._met(fingerprint)
        here = sorted(questions.keys() & roster.nodes.keys())
        answers: dict[int, Answer] = {
            client: _away(f"client {client} is not connected to the edge {self._name}")
            for client in questions.keys() - roster.nodes.keys()
        }
        federation = self._config.federation
        mailbox = Mailbox(
            self._grid,
            _KINDS[task],
            str(number),
            federation.round_timeout,
            patience=federation.wait_timeout,
            wanted=lambda: False,  # a node that comes back is asked again as long as others work, and not longer
            meanwhile=check,
        )
        by_node = roster.by_node(here)
        weights = {client: summed.weight_of(part) for client, part in questions.items()}
        sums = task == "train" and all(weights.values())
        below = {client for client in here if roster.infos[client].edges}  # whose edges are to add up, too
        passed = {c: part if c in below else summed.without_weight(part) for c, part in questions.items()}
        for node, clients in by_node.items():
            most = sum(self._most_bytes(task, client, questions[client], fingerprint) for client in clients)
            others = most if task in ("keys", "shares", "open") else 0
            make = partial(roster.message, node, clients, passed.__getitem__)
            mailbox.post(node, make, lambda most=most: most, others)
        for node, reply in mailbox.replies():
            answers |= roster.answers(node, by_node[node], reply)
        within = [answer for answer in answers.values() if isinstance(answer, RecordDict)]
        if sums:
            for client in questions.keys() - {*here}:  # the largest rank is that of all that the server asks
                self._most_bytes(task, client, questions[client], fingerprint)
            sent = {client: self._sent[client] for client in questions}
            answers |= self._added_up(answers, sent, by_node, weights, fingerprint)
        self._sent = {
            client: replace(sent, adapter=without_values(sent.adapter)) for client, sent in self._sent.items()
        }
        made = {client: self._part(client, answers[client]) for client in sorted(answers)}
        given = [part for part in made.values() if isinstance(part, RecordDict)]
        emit(
            "region-answered",
            task=task,
            round=number,
            clients=len(given),
            failed=len(made) - len(given),
            **{
                "download-bytes": sum(map(wire.payload_bytes, questions.values())),
                "upload-bytes": sum(map(wire.payload_bytes, within)),
                "sent-up-bytes": sum(map(wire.payload_bytes, given)),
            },
        )
        return parts.join(made)

    def _added_up(
        self,
        answers: Mapping[int, Answer],
        sent: Mapping[int, Broadcast],
        by_node: Mapping[int, list[int]],
        weights: Mapping[int, int],
        fingerprint: str,
    ) -> Mapping[int, Answer]:
        """The parts of the clients that can be counted, with their mean in the first."""
        together = {client: clients for clients in by_node.values() for client in clients}
        return add_up(
            {client: answer for client, answer in answers.items() if isinstance(answer, RecordDict)},
            sent,
            together,
            weights,
            fingerprint,
            private=self._config.privacy.level == "example",
        )

    def _most_bytes(self, task: str, client: int, question: RecordDict, fingerprint: str) -> int:
        """The largest number of bytes of a client's answer."""
        if task == "train":
            sent = wire.decode_broadcast(summed.without_weight(question), fingerprint)
            self._sent[client] = replace(sent, folds=(), control=None)
            return wire.most_bytes(sent)
        if task == "project":
            if client not in self._sent:
                raise WireError("it has begun anew since this round's first question, and cannot ask the second")
            sent = self._sent[client]
            return wire.bytes_for(sketches.asked(sent.plan, sent.adapter, second=True))
        if task == "evaluate":
            return SMALL
        return max(SMALL, secure_messages.most_bytes(1, secure_messages.size(question) // _LEAST_NEIGHBOUR))

    def _part(self, client: int, answer: Answer) -> RecordDict | Error:
        """A client's part of the answer: what it said, or why there is nothing."""
        if answer is None:
            return _away(f"client {client} did not answer the edge {self._name} before its deadline")
        if isinstance(answer, WireError):
            return Error(wire.REFUSED, str(answer))
        if isinstance(answer, RecordDict):
            try:
                parts.join({client: answer})
            except WireError as error:
                return Error(wire.REFUSED, str(error))
        return answer


def _away(reason: str) -> Error:
    return Error(ErrorCode.NODE_UNAVAILABLE, reason)


def _fingerprint(content: RecordDict) -> str:
    """The base model's fingerprint in a message of the server; the edge itself needs no base model."""
    head: Mapping[str, object] = content.config_records.get(HEAD, {})
    return str(head.get("base", ""))
