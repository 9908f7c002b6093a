"""What clients are asked and what they answer: who they are, one round's training, an evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.config import Config, rank_pattern
from fedlora.errors import FedLoraError, RunError, WireError
from fedlora.events import emit
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .mailbox import Mailbox

_HELLO_SECONDS = 600.0  # a client's first answer may need a download
_LONGEST_REASON = 500  # characters of a client's own words in the record
_log = logging.getLogger("fedlora")


@dataclass
class Roster:
    """Who takes part: what the server knows of each client, and the node that it lives on."""

    infos: dict[int, ClientInfo]
    nodes: dict[int, int]


def meet(grid: Grid, config: Config, fingerprint: str) -> Roster:
    """Wait for the clients to connect and ask each who it is.

    Raises:
        RunError: fewer than `federation.min-clients` are there after `federation.wait-timeout`, two nodes say
            that they are one client, or too many cannot take part.
    """
    wanted, least, wait = config.federation.clients, config.federation.min_clients, config.federation.wait_timeout
    deadline = time.monotonic() + wait
    nodes = list(grid.get_node_ids())
    if len(nodes) < wanted:
        _log.info("waiting up to %.0f s for %d clients (federation.clients)", wait, wanted)
    while len(nodes) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        nodes = list(grid.get_node_ids())
    if len(nodes) < least:
        raise RunError(
            f"{len(nodes)} of {wanted} clients connected within {wait:.0f} s, and federation.min-clients = {least}; "
            "start more clients or raise federation.wait-timeout"
        )
    mailbox = Mailbox(grid, "query", "0", max(wait, _HELLO_SECONDS))
    for node in nodes:
        mailbox.post(node, partial(wire.encode_hello, fingerprint))
    roster = Roster({}, {})
    refusals: list[str] = []
    for node, reply in mailbox.replies():
        who = f"node {node}"
        try:
            info = _same_run(wire.decode_info(_content(reply, who), fingerprint, who), config, who)
        except FedLoraError as error:
            refusals.append(str(error))
            emit("client-failed", client_id=None, node=node, reason=str(error), round=0)
            continue
        if info.client_id in roster.nodes:
            raise RunError(
                f"nodes {roster.nodes[info.client_id]} and {node} both say that they are client {info.client_id}; "
                "give each its own partition-id"
            )
        roster.infos[info.client_id], roster.nodes[info.client_id] = info, node
    if len(roster.infos) < least:
        why = f"; the first said: {refusals[0]}" if refusals else ""
        raise RunError(
            f"{len(roster.infos)} of {len(nodes)} clients can take part, and federation.min-clients = {least}{why}"
        )
    roster.infos = dict(sorted(roster.infos.items()))
    return roster


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
        clients = {self.roster.nodes[client]: client for client in chosen}
        for client in chosen:
            self._post(mailbox, client)
        settled: dict[int, ClientUpdate | None] = {}
        queue = list(chosen)
        replies = mailbox.replies()
        while queue:
            with _adding(self, "wait_seconds"):
                node, reply = next(replies)
            client = clients[node]
            if reply is not None and reply.has_error() and reply.error.code == wire.STALE and self._is_behind(client):
                self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=0)
                self._post(mailbox, client)
                continue
            with _adding(self, "decode_seconds"):
                settled[client] = self._settle(client, reply)
                if not self.keep:
                    self.sent.pop(client, None)
            while queue and queue[0] in settled:
                update = settled.pop(queue.pop(0))
                if update is not None:
                    yield update

    def _is_behind(self, client: int) -> bool:
        return self.roster.infos[client].known_base_version > 0

    def _post(self, mailbox: Mailbox, client: int) -> None:
        mailbox.post(self.roster.nodes[client], partial(self._encoded, client))

    def _encoded(self, client: int) -> RecordDict:
        with _adding(self, "encode_seconds"):
            broadcast = self.make_broadcast(self.roster.infos[client])
            content = wire.encode_broadcast(broadcast, self.fingerprint, self.config.wire.dtype)
            self.sent[client] = wire.as_received(broadcast, self.config.wire.dtype)
            self.download_bytes += wire.payload_bytes(content)
            return content

    def _settle(self, client: int, reply: Message | None) -> ClientUpdate | None:
        try:
            content = _content(reply, f"client {client}")
            known = self.roster.infos[client].num_examples
            answer = wire.decode_update(content, client, self.sent[client], self.fingerprint, known)
        except WireError as error:
            self.failures[client] = str(error)
            node = self.roster.nodes[client]
            emit("client-failed", client_id=client, node=node, reason=str(error), round=self.number)
            return None
        self.upload_bytes += wire.payload_bytes(content)
        self.answers[client] = dict(answer.update.metrics) | {"num-examples": answer.update.num_examples}
        self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=answer.known_base_version)
        if self.keep:
            self.kept.append(answer.update)
        node = self.roster.nodes[client]
        emit("client-done", client_id=client, node=node, round=self.number, metrics=self.answers[client])
        return answer.update

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
    clients = {roster.nodes[client]: client for client in chosen}

    def encoded(client: int) -> RecordDict:
        broadcast = make_broadcast(replace(roster.infos[client], known_base_version=0))
        return wire.encode_broadcast(broadcast, fingerprint, config.wire.dtype)

    for node, client in clients.items():
        mailbox.post(node, partial(encoded, client))
    answers: dict[int, dict[str, float]] = {}
    failures: dict[int, str] = {}
    for node, reply in mailbox.replies():
        client = clients[node]
        who = f"client {client}"
        try:
            count, metrics = wire.decode_evaluation(_content(reply, who), fingerprint, who)
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


def _content(reply: Message | None, who: str) -> RecordDict:
    """The reply's content, or why there is none."""
    if reply is None:
        raise WireError(f"{who} did not answer before the deadline (federation.round-timeout)")
    if reply.has_error():
        reason = (reply.error.reason or f"error {reply.error.code}").strip()
        last_line = reason.splitlines()[-1] if reason else "no reason given"
        last_line = "".join(c for c in last_line[:_LONGEST_REASON] if c.isprintable())
        verb = "refused" if reply.error.code == wire.REFUSED else "failed"
        raise WireError(f"{who} {verb}: {last_line}")
    return reply.content


class _adding:
    """`with _adding(round, "wait_seconds"):` adds the block's wall time to that attribute."""

    def __init__(self, owner: TrainRound, name: str) -> None:
        self._owner, self._name = owner, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, getattr(self._owner, self._name) + time.perf_counter() - self._began)
