"""Sends the messages of a round or of an evaluation to the clients, and collects their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.app import Error, RecordDict
from flwr.serverapp import Grid

from fedlora.common.errors import WireError
from fedlora.common.events import emit
from fedlora.config import Config
from fedlora.data import most_kept_back
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, wire
from fedlora.tasks.registry import task_of

from . import answers as of_client
from . import audit, guard
from .answers import Answer, AwayError, DivergedReplyError
from .mailbox import Mailbox
from .roster import Roster

_LOOKED_AT = 32  # number of first replies that are judged together, before any of them counts


@dataclass
class TrainRound:
    """One round of training messages and their results.

    Attributes:
        answers: client id -> its metrics and number of examples, for all clients that count.
        failures: client id -> reason why the client does not count in this round.
        refused: those of `failures` that answered, but whose answers do not count.
        diverged: those of `failures` whose training was not finite.
        moves: client id -> distance by which its reply moved the model (see `guard.moved`), also of ignored replies.
        kept: the updates of all clients that count, if `keep` is set.
        sent: client id -> its broadcast, as the client received it; with `keep`, for all clients.
        wait_seconds, decode_seconds: seconds that `updates` spent on waiting for replies and on reading them.
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
    refused: set[int] = field(default_factory=set)
    diverged: set[int] = field(default_factory=set)
    moves: dict[int, float] = field(default_factory=dict)
    kept: list[ClientUpdate] = field(default_factory=list)
    upload_bytes: int = 0
    download_bytes: int = 0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    sent: dict[int, Broadcast] = field(default_factory=dict)
    _counted: dict[int, int] = field(default_factory=dict)
    _moved: dict[int, float] = field(default_factory=dict)

    def trusted(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """`updates` without those that move the model much farther than the others; see `guard`.

        The first 32 replies are judged together. Each later one is compared with those before it, so that the replies
        of a large round need not all be in memory.
        """
        waiting: list[ClientUpdate] = []
        enough = False
        for update in self.updates(chosen):
            self.moves[update.client_id] = self._moved.pop(update.client_id)
            waiting.append(update)
            enough = enough or len(waiting) == _LOOKED_AT
            if enough:
                yield from self._passed(waiting)
                waiting = []
        yield from self._passed(waiting)

    def _passed(self, updates: Sequence[ClientUpdate]) -> Iterator[ClientUpdate]:
        # A robust rule needs all clients, and treats extreme updates itself.
        bound = self.config.federation.max_move if self.config.strategy.robust == "none" else 0.0
        dtype = self.config.model.compute_dtype
        for update in updates:
            client = update.client_id
            why = guard.overflow(update, self.moves[client], dtype) or guard.excess(client, self.moves, bound)
            if why:
                self.kept = [other for other in self.kept if other.client_id != client]
                del self.answers[client]
                self._fail(client, WireError(f"client {client}: {why}"))
            else:
                yield update

    def updates(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """The usable updates in the order of client ids, each as soon as all before it have been read.

        The fixed order makes equal runs bitwise equal, whatever the order of arrival.
        """
        federation = self.config.federation
        claims = {client: self.roster.infos[client].num_examples for client in chosen}
        self._counted = guard.weights(claims, federation.max_share)
        least = min(federation.min_clients, len(chosen))
        mailbox = Mailbox(
            self.grid,
            "train",
            str(self.number),
            federation.round_timeout,
            patience=federation.wait_timeout,
            wanted=lambda: len(self.answers) < least,
        )
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
        mailbox.post(
            node,
            partial(self.roster.message, node, clients, self._encoded),
            most=lambda: sum(wire.most_bytes(self.sent[client]) for client in clients),
        )

    def _encoded(self, client: int) -> RecordDict:
        with _adding(self, "encode_seconds"):
            broadcast = self.make_broadcast(self.roster.infos[client])
            content = wire.encode_broadcast(broadcast, self.fingerprint, self.config.wire.dtype)
            self.sent[client] = wire.as_received(broadcast, self.config.wire.dtype)
            self.download_bytes += wire.payload_bytes(content)
            return content

    def _settle(self, client: int, answer: Answer) -> ClientUpdate | None:
        try:
            content = of_client.content(answer, f"client {client}")
            known = self.roster.infos[client].num_examples
            reply = wire.decode_update(content, client, self.sent[client], self.fingerprint, known)
        except WireError as error:
            self._fail(client, error)
            return None
        update = replace(reply.update, num_examples=min(reply.update.num_examples, self._counted[client]))
        self._moved[client] = guard.moved(update, self.sent[client])
        self.upload_bytes += wire.payload_bytes(content)
        self.answers[client] = dict(update.metrics) | {"num-examples": update.num_examples}
        self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=reply.known_base_version)
        if self.keep:
            self.kept.append(update)
        node = self.roster.nodes[client]
        emit("client-done", client_id=client, node=node, round=self.number, metrics=self.answers[client])
        if digest := audit.digest(content):
            emit("client-answered", client_id=client, node=node, round=self.number, sha256=digest)
        return update

    def _fail(self, client: int, error: WireError) -> None:
        self.failures[client] = str(error)
        if not isinstance(error, AwayError):
            self.refused.add(client)
        if isinstance(error, DivergedReplyError):
            self.diverged.add(client)
        emit("client-failed", client_id=client, node=self.roster.nodes[client], reason=str(error), round=self.number)

    def weighed(self) -> dict[int, dict[str, float]]:
        """`answers` in the order of client ids, each with the client's `weight` in the round's means."""
        total = sum(answer["num-examples"] for answer in self.answers.values())
        return {c: a | {"weight": a["num-examples"] / total} for c, a in sorted(self.answers.items())}

    def mean(self, metric: str) -> float | None:
        """The mean of a metric over the clients that count, weighted by their numbers of examples."""
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
    """Let the chosen clients evaluate on their own test rows; return their metrics and the weighted means."""
    mailbox = Mailbox(grid, "evaluate", str(number), config.federation.round_timeout)
    asked = roster.by_node(chosen)

    def encoded(client: int) -> RecordDict:
        # SCAFFOLD's c is for training alone
        broadcast = replace(make_broadcast(replace(roster.infos[client], known_base_version=0)), control=None)
        return wire.encode_broadcast(broadcast, fingerprint, config.wire.dtype)

    for node, clients in asked.items():
        mailbox.post(node, partial(roster.message, node, clients, encoded))
    answers: dict[int, dict[str, float]] = {}
    failures: dict[int, str] = {}
    for node, reply in mailbox.replies():
        for client, answer in roster.answers(node, asked[node], reply).items():
            who = f"client {client}"
            most = most_kept_back(roster.infos[client].num_examples, config.data.client_test_fraction)
            try:
                count, metrics = wire.decode_evaluation(
                    of_client.content(answer, who), fingerprint, who, task_of(config.model).metrics, most
                )
                answers[client] = metrics | {"num-examples": count}
            except WireError as error:
                failures[client] = str(error)
                emit("client-failed", client_id=client, node=node, reason=str(error), round=number)
    counted = guard.weights({c: int(a["num-examples"]) for c, a in answers.items()}, config.federation.max_share)
    answers = {client: answer | {"num-examples": counted[client]} for client, answer in answers.items()}
    names = sorted({name for metrics in answers.values() for name in metrics} - {"num-examples"})
    means = {name: weighted_mean(answers, name) for name in names}
    return {"mean": means, "clients": dict(sorted(answers.items())), "failures": failures}


def weighted_mean(answers: Mapping[int, Mapping[str, float]], metric: str) -> float | None:
    """The mean of a metric over the clients that sent it, weighted by num-examples; None if no client did."""
    having = [answer for answer in answers.values() if metric in answer]
    total = sum(answer["num-examples"] for answer in having)
    return sum(answer[metric] * (answer["num-examples"] / total) for answer in having) if having else None


class _adding:
    """`with _adding(round, "wait_seconds"):` adds the block's wall time to that attribute."""

    def __init__(self, owner: TrainRound, name: str) -> None:
        self._owner, self._name = owner, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, getattr(self._owner, self._name) + time.perf_counter() - self._began)
