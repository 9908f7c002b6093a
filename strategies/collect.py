"""What clients are asked and what they answer: who they are, one round's training, an evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora import parts, wire
from fedlora.config import Config, rank_pattern
from fedlora.errors import FedLoraError, RunError, WireError
from fedlora.events import emit
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .mailbox import Mailbox

_HELLO_SECONDS = 600.0  # a client's first answer may need a download
_LONGEST_REASON = 500  # characters of a client's own words in the record
_LOOK_SECONDS = 0.5
# What came of a question to one client: None when the deadline passed, a WireError where its node's reply is malformed.
Answer = RecordDict | Error | WireError | None
_log = logging.getLogger("fedlora")


@dataclass
class Roster:
    """Who takes part: what the server knows of each client, and the node that it lives on.

    Attributes:
        infos, nodes: by client id.
        hosts: nodes whose messages have a part for each of several clients.
    """

    infos: dict[int, ClientInfo]
    nodes: dict[int, int]
    hosts: set[int] = field(default_factory=set)

    def by_node(self, chosen: Sequence[int]) -> dict[int, list[int]]:
        """Node -> those of its clients that are chosen, in their order: they are asked by one message."""
        found: dict[int, list[int]] = {}
        for client in chosen:
            found.setdefault(self.nodes[client], []).append(client)
        return found

    def message(self, node: int, clients: Sequence[int], encoded: Callable[[int], RecordDict]) -> RecordDict:
        """What a node is sent for these of its clients; `encoded` makes one client's message."""
        if node in self.hosts:
            return parts.join({client: encoded(client) for client in clients})
        [client] = clients
        return encoded(client)

    def answers(self, node: int, clients: Sequence[int], reply: Message | None) -> dict[int, Answer]:
        """What a node answers for these of its clients; one that is malformed as a whole is so for each of them."""
        answer = _answer(reply)
        if node not in self.hosts or not isinstance(answer, RecordDict):
            return dict.fromkeys(clients, answer)
        try:
            found = parts.split(answer, f"node {node}")
            if found.keys() != {*clients}:
                raise WireError(f"node {node} answered for clients {sorted(found)[:5]}, it was asked for {clients[:5]}")
        except WireError as error:
            return dict.fromkeys(clients, error)
        return {client: found[client] for client in clients}


def meet(grid: Grid, config: Config, fingerprint: str) -> Roster:
    """Ask each node that connects who its clients are, until all are there or `federation.wait-timeout` is over.

    Raises:
        RunError: fewer than `federation.min-clients` are there by then, two nodes say that they are one client, or
            too many cannot take part.
    """
    wanted, least, wait = config.federation.clients, config.federation.min_clients, config.federation.wait_timeout
    deadline = time.monotonic() + wait
    roster = Roster({}, {})
    refusals: list[str] = []
    asked: set[int] = set()
    nodes: set[int] = set()
    reached, told, late = 0, False, False
    while not late and reached < wanted:
        late = time.monotonic() >= deadline
        before, nodes = nodes, {*grid.get_node_ids()}
        # Others may be about to connect: a first answer takes long, and many at a time take no longer.
        if late or nodes == before or len(nodes) >= wanted:
            newcomers = sorted(nodes - asked)
            asked |= nodes
            refusals += _introduced(grid, config, fingerprint, newcomers, roster)
            reached = len(roster.infos) + len(refusals)
        if not late and reached < wanted:
            if not told:
                _log.info("waiting up to %.0f s for %d clients (federation.clients)", wait, wanted)
            told = True
            time.sleep(_LOOK_SECONDS)
    if reached < least:
        raise RunError(
            f"{reached} of {wanted} clients connected within {wait:.0f} s, and federation.min-clients = {least}; "
            "start more clients or raise federation.wait-timeout"
        )
    if len(roster.infos) < least:
        why = f"; the first said: {refusals[0]}" if refusals else ""
        raise RunError(
            f"{len(roster.infos)} of {reached} clients can take part, and federation.min-clients = {least}{why}"
        )
    roster.infos = dict(sorted(roster.infos.items()))
    return roster


def _introduced(grid: Grid, config: Config, fingerprint: str, nodes: Sequence[int], roster: Roster) -> list[str]:
    """Enter the clients of these nodes into the roster; why others cannot take part.

    Raises:
        RunError: two nodes say that they are one client.
    """
    mailbox = Mailbox(grid, "query", "0", max(config.federation.wait_timeout, _HELLO_SECONDS))
    for node in nodes:
        mailbox.post(node, partial(wire.encode_hello, fingerprint))
    refusals: list[str] = []
    for node, reply in mailbox.replies():
        for client, answer in _introductions(node, reply).items():
            who = f"node {node}" if client is None else f"client {client} on node {node}"
            try:
                info = _same_run(wire.decode_info(_content(answer, who), fingerprint, who), config, who)
                if client not in (None, info.client_id):
                    raise WireError(f"{who} says that it is client {info.client_id}")
            except FedLoraError as error:
                refusals.append(str(error))
                emit("client-failed", client_id=client, node=node, reason=str(error), round=0)
                continue
            if info.client_id in roster.nodes:
                raise RunError(
                    f"nodes {roster.nodes[info.client_id]} and {node} both say that they are client {info.client_id}; "
                    "give each its own partition-id"
                )
            roster.infos[info.client_id], roster.nodes[info.client_id] = info, node
            if client is not None:
                roster.hosts.add(node)
    return refusals


def _introductions(node: int, reply: Message | None) -> dict[int | None, Answer]:
    """A node's answers to the server's first question: its only client's, under no id, or one for each it hosts."""
    answer = _answer(reply)
    if not isinstance(answer, RecordDict) or not parts.is_joined(answer):
        return {None: answer}
    try:
        return {**parts.split(answer, f"node {node}")}
    except WireError as error:
        return {None: error}


@dataclass
class TrainRound:
    """One round of training messages, and what came of it.

    Attributes:
        answers: client id -> its metrics.
        failures: client id -> why it does not count in this round.
        kept: the updates, when `keep` is set.
        sent: client id -> its broadcast, as the client reads it; with `keep`, of all clients.
        wait_seconds, decode_seconds: of `updates`.
    """

    grid: Grid
    config: Config
    fingerprint: str
    roster: Roster
    number: int
    make_broadcast: Callable[[ClientInfo], Broadcast]
    keep: bool = True
    answers: dict[int, dict[str, float]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    kept: list[ClientUpdate] = field(default_factory=list)
    upload_bytes: int = 0
    download_bytes: int = 0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    sent: dict[int, Broadcast] = field(default_factory=dict)

    def updates(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """Good updates in the order of client ids, each as soon as those before it are settled.

        The fixed order makes equal runs bitwise equal, whatever the order of arrival.
        """
        mailbox = Mailbox(self.grid, "train", str(self.number), self.config.federation.round_timeout)
        asked = self.roster.by_node(chosen)
        for node, clients in asked.items():
            self._post(mailbox, node, clients)
        settled: dict[int, ClientUpdate | None] = {}
        queue = list(chosen)
        replies = mailbox.replies()
        while queue:
            with _adding(self, "wait_seconds"):
                node, reply = next(replies)
            with _adding(self, "decode_seconds"):
                answers = self.roster.answers(node, asked[node], reply)
            behind = [client for client, answer in answers.items() if self._is_behind(client, answer)]
            if behind:
                for client in behind:
                    self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=0)
                asked[node] = behind
                self._post(mailbox, node, behind)
            with _adding(self, "decode_seconds"):
                for client in [client for client in answers if client not in behind]:
                    settled[client] = self._settle(client, answers.pop(client))
                    if not self.keep:
                        self.sent.pop(client, None)
            while queue and queue[0] in settled:
                update = settled.pop(queue.pop(0))
                if update is not None:
                    yield update

    def _is_behind(self, client: int, answer: Answer) -> bool:
        stale = isinstance(answer, Error) and answer.code == wire.STALE
        return stale and self.roster.infos[client].known_base_version > 0

    def _post(self, mailbox: Mailbox, node: int, clients: Sequence[int]) -> None:
        mailbox.post(node, partial(self.roster.message, node, clients, self._encoded))

    def _encoded(self, client: int) -> RecordDict:
        with _adding(self, "encode_seconds"):
            broadcast = self.make_broadcast(self.roster.infos[client])
            content = wire.encode_broadcast(broadcast, self.fingerprint, self.config.wire.dtype)
            self.sent[client] = wire.as_received(broadcast, self.config.wire.dtype)
            self.download_bytes += wire.payload_bytes(content)
            return content

    def _settle(self, client: int, answer: Answer) -> ClientUpdate | None:
        try:
            content = _content(answer, f"client {client}")
            known = self.roster.infos[client].num_examples
            reply = wire.decode_update(content, client, self.sent[client], self.fingerprint, known)
        except WireError as error:
            self.failures[client] = str(error)
            node = self.roster.nodes[client]
            emit("client-failed", client_id=client, node=node, reason=str(error), round=self.number)
            return None
        self.upload_bytes += wire.payload_bytes(content)
        self.answers[client] = dict(reply.update.metrics) | {"num-examples": reply.update.num_examples}
        self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=reply.known_base_version)
        if self.keep:
            self.kept.append(reply.update)
        node = self.roster.nodes[client]
        emit("client-done", client_id=client, node=node, round=self.number, metrics=self.answers[client])
        return reply.update

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over the clients that answered, weighted by their examples."""
        return weighted_mean(self.answers, metric)


def evaluate_on_clients(
    grid: Grid,
    config: Config,
    fingerprint: str,
    roster: Roster,
    chosen: Sequence[int],
    *,
    number: int,
    make_broadcast: Callable[[ClientInfo], Broadcast],
) -> dict[str, Any]:
    """Federated evaluation: the chosen clients' metrics on their own test rows, and their weighted means."""
    mailbox = Mailbox(grid, "evaluate", str(number), config.federation.round_timeout)
    asked = roster.by_node(chosen)

    def encoded(client: int) -> RecordDict:
        broadcast = make_broadcast(replace(roster.infos[client], known_base_version=0))
        return wire.encode_broadcast(broadcast, fingerprint, config.wire.dtype)

    for node, clients in asked.items():
        mailbox.post(node, partial(roster.message, node, clients, encoded))
    answers: dict[int, dict[str, float]] = {}
    failures: dict[int, str] = {}
    for node, reply in mailbox.replies():
        for client, answer in roster.answers(node, asked[node], reply).items():
            who = f"client {client}"
            try:
                count, metrics = wire.decode_evaluation(_content(answer, who), fingerprint, who)
                answers[client] = metrics | {"num-examples": count}
            except WireError as error:
                failures[client] = str(error)
                emit("client-failed", client_id=client, node=node, reason=str(error), round=number)
    names = sorted({name for metrics in answers.values() for name in metrics} - {"num-examples"})
    means = {name: weighted_mean(answers, name) for name in names}
    return {"mean": means, "clients": dict(sorted(answers.items())), "failures": failures}


def weighted_mean(answers: Mapping[int, Mapping[str, float]], metric: str) -> float | None:
    """The mean of a metric over the clients that sent it, weighted by num-examples; None when nobody did."""
    having = [answer for answer in answers.values() if metric in answer]
    total = sum(answer["num-examples"] for answer in having)
    return sum(answer[metric] * (answer["num-examples"] / total) for answer in having) if having else None


def _same_run(info: ClientInfo, config: Config, who: str) -> ClientInfo:
    """The client's description, if it goes by this run's rank pattern: regular expressions that the server evaluates.

    Raises:
        WireError: it has another pattern.
    """
    if dict(info.rank_pattern) != rank_pattern(config.lora):
        raise WireError(f"{who} has another lora.rank-pattern than this run, which goes for every client alike")
    return info


def _answer(reply: Message | None) -> RecordDict | Error | None:
    if reply is None:
        return None
    return reply.error if reply.has_error() else reply.content


def _content(answer: Answer, who: str) -> RecordDict:
    """The answer's content, or why there is none."""
    if answer is None:
        raise WireError(f"{who} did not answer before the deadline (federation.round-timeout)")
    if isinstance(answer, WireError):
        raise answer
    if isinstance(answer, Error):
        reason = (answer.reason or f"error {answer.code}").strip()
        last_line = reason.splitlines()[-1] if reason else "no reason given"
        last_line = "".join(c for c in last_line[:_LONGEST_REASON] if c.isprintable())
        verb = "refused" if answer.code == wire.REFUSED else "failed"
        raise WireError(f"{who} {verb}: {last_line}")
    return answer


class _adding:
    """`with _adding(round, "wait_seconds"):` adds the block's wall time to that attribute."""

    def __init__(self, owner: TrainRound, name: str) -> None:
        self._owner, self._name = owner, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, getattr(self._owner, self._name) + time.perf_counter() - self._began)
