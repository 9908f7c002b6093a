"""Sends the messages of a round or of an evaluation to the clients, and collects their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.app import Error, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlora.adapters import AdapterState, without_values
from fedlora.common.errors import WireError
from fedlora.common.events import emit
from fedlora.config import Config
from fedlora.data import most_kept_back
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, sketches, wire
from fedlora.tasks.registry import task_of

from ..tools.shelf import Shelf
from . import answers as of_client
from . import audit, clock, guard
from .answers import Answer, AwayError, DivergedReplyError
from .mailbox import Mailbox
from .roster import Roster

_LOOKED_AT = 32  # number of first replies that are judged together, before any of them counts
_METRICS_BYTES = 16 << 10  # largest number of bytes of a client's metrics, where its node hosts several


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
        shelf: where replies wait for their turn, or until they are judged.
        borders: name of an edge -> bytes that crossed to it and from it in this round, as `crossed` counts them.
        sketch_loss: with sketched updates, an estimate of what their sum has lost; see `adapters.sketched_sum.loss`.
        began: the time at which its clients were asked.
        wait_seconds, decode_seconds: seconds that `updates` spent on waiting for replies and on reading them.
    """

    grid: Grid
    config: Config
    fingerprint: str
    roster: Roster
    number: int
    make_broadcast: Callable[[ClientInfo], Broadcast]
    keep: bool = True
    shelf: Shelf = field(default_factory=Shelf)
    sketch_loss: float | None = None
    began: float = 0.0
    answers: dict[int, dict[str, float]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    diverged: set[int] = field(default_factory=set)
    moves: dict[int, float] = field(default_factory=dict)
    kept: list[ClientUpdate] = field(default_factory=list)
    upload_bytes: int = 0
    download_bytes: int = 0
    borders: dict[str, dict[str, int]] = field(default_factory=dict)
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    sent: dict[int, Broadcast] = field(default_factory=dict)
    _counted: dict[int, int] = field(default_factory=dict)
    _moved: dict[int, float] = field(default_factory=dict)

    def trusted(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """`updates` without those that move the model much farther than the others; see `guard`.

        The first 32 replies are judged together. Each later one is compared with those before it, so that the replies
        of a large round need not all be in memory. Those that wait are on the shelf.
        """
        yield from self._judged(self.updates(chosen), self.moves)

    def _judged(self, updates: Iterator[ClientUpdate], moves: dict[int, float]) -> Iterator[ClientUpdate]:
        waiting: list[Callable[[], ClientUpdate]] = []
        enough = not self._bound
        for update in updates:
            moves[update.client_id] = self._moved.pop(update.client_id)
            if enough:
                yield from self._passed([lambda update=update: update], moves)
                continue
            waiting.append(self.shelf.put(update))
            if len(waiting) == _LOOKED_AT:
                yield from self._passed(waiting, moves)
                waiting, enough = [], True
        yield from self._passed(waiting, moves)

    @property
    def _bound(self) -> float:
        """How many times the others' median an update may move the model; 0: any."""
        # A robust rule needs all clients, and treats extreme updates itself. With privacy of clients, each is clipped,
        # and none may decide whether another one counts.
        free = self.config.strategy.robust == "none" and self.config.privacy.level != "client"
        return self.config.federation.max_move if free else 0.0

    def _passed(
        self, updates: Sequence[Callable[[], ClientUpdate]], moves: Mapping[int, float]
    ) -> Iterator[ClientUpdate]:
        bound, dtype = self._bound, self.config.model.compute_dtype
        for take in updates:
            update = take()
            client = update.client_id
            why = guard.overflow(update, moves[client], dtype) or guard.excess(client, moves, bound)
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
        self._counted, self.began = self.weights(chosen), clock.of(self.grid).now()
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
        yield from self._in_turn(chosen, mailbox, asked, self._settle)

    def weights(self, clients: Sequence[int]) -> dict[int, int]:
        """The number of examples with which each of these clients counts, if all of them answer."""
        claims = {client: self.roster.infos[client].num_examples for client in clients}
        private = self.config.privacy.level == "client"  # there, no client decides how much another one counts
        return guard.weights(claims, 0.0 if private else self.config.federation.max_share)

    def crossed(self, client: int, way: str, count: int) -> None:
        """Count bytes to ("download") or from ("upload") a client, also as those of the edge through which they go."""
        setattr(self, f"{way}_bytes", getattr(self, f"{way}_bytes") + count)
        for edge in self.roster.infos[client].edges[:1]:
            border = self.borders.setdefault(edge, {"download-bytes": 0, "upload-bytes": 0})
            border[f"{way}-bytes"] += count

    def expected(self, chosen: Sequence[int]) -> int:
        """The number of clients that may count in this round."""
        return len(chosen)

    def awake(self, client: int) -> bool:
        """Whether a client's device is there now; see `clock.awake`."""
        return clock.awake(self.grid, self.roster.nodes[client])

    def facts(self) -> dict[str, object]:
        """What the round's entry in the record has besides: the time, where it is a virtual one."""
        return {"time": clock.of(self.grid).now()} if clock.is_virtual(self.grid) else {}

    def members(self, update: ClientUpdate) -> Iterable[ClientUpdate]:
        """The replies that this one stands for: itself."""
        return [update]

    def again(self, clients: Collection[int], bases: Mapping[str, Tensor], run: str) -> Iterator[ClientUpdate]:
        """The answers of these clients to the second question, in the order of their ids.

        The adapters have the tensors of the second pass. A client that gives no answer, or a wrong one, does not count
        in this round any more.

        Args:
            clients: those whose first reply counts.
            bases: Q of each module that is sketched; see `adapters.sketched_sum`.
            run: key of the run.
        """
        federation, chosen = self.config.federation, sorted(clients)
        plan = self._start(chosen[0]).plan
        question = sketches.question(self.number, plan, bases, run)
        like = sketches.asked(plan, self._start(chosen[0]).adapter, second=True)
        least, heard = min(federation.min_clients, len(chosen)), set[int]()
        mailbox = Mailbox(
            self.grid,
            "train.project",
            str(self.number),
            federation.round_timeout,
            patience=federation.wait_timeout,
            wanted=lambda: len(heard) < least,
        )
        asked = self.roster.by_node(chosen)

        def encoded(client: int) -> RecordDict:
            with adding(self, "encode_seconds"):
                content = wire.encode_second(question, self.fingerprint)
                self.crossed(client, "download", wire.payload_bytes(content))
                return content

        def settle(client: int, answer: Answer) -> ClientUpdate | None:
            update = self._settle_second(client, answer, like, bases)
            if update is None:
                del self.answers[client]
            else:
                heard.add(client)
            return update

        for node, of_node in asked.items():
            most = len(of_node) * wire.bytes_for(like)
            mailbox.post(node, partial(self.roster.message, node, of_node, encoded), most=lambda most=most: most)
        yield from self._judged(self._in_turn(chosen, mailbox, asked, settle, folds=False), {})

    def _in_turn(
        self,
        chosen: Sequence[int],
        mailbox: Mailbox,
        asked: dict[int, list[int]],
        settle: Callable[[int, Answer], ClientUpdate | None],
        *,
        folds: bool = True,
    ) -> Iterator[ClientUpdate]:
        """The usable answers to what was posted, in the order of `chosen`; early ones wait on the shelf.

        Args:
            chosen: the clients.
            mailbox: with the questions.
            asked: node -> its clients among them.
            settle: reads a client's answer; None if it does not count.
            folds: whether a client may answer that it lacks the folds, and then gets them.
        """
        settled: dict[int, Callable[[], ClientUpdate] | None] = {}
        queue = list(chosen)
        replies = mailbox.replies()
        while queue:
            with adding(self, "wait_seconds"):
                node, reply = next(replies)
            with adding(self, "decode_seconds"):
                answers = self.roster.answers(node, asked[node], reply)
            behind = [client for client, answer in answers.items() if folds and self._is_behind(client, answer)]
            if behind:
                for client in behind:
                    self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=0)
                asked[node] = behind
                self._post(mailbox, node, behind)
            for client in [client for client in answers if client not in behind]:
                with adding(self, "decode_seconds"):
                    update = settle(client, answers.pop(client))
                    if not self.keep:
                        self.sent.pop(client, None)
                if update is not None and client == queue[0]:
                    queue.pop(0)
                    yield update
                else:
                    settled[client] = self.shelf.put(update) if update is not None else None
                while queue and queue[0] in settled:
                    if take := settled.pop(queue.pop(0)):
                        yield take()

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
        with adding(self, "encode_seconds"):
            broadcast = self.make_broadcast(self.roster.infos[client])
            content = wire.encode_broadcast(broadcast, self.fingerprint, self.config.wire.dtype)
            self.sent[client] = wire.as_received(broadcast, self.config.wire.dtype)
            self.crossed(client, "download", wire.payload_bytes(content))
            return content

    def _settle(self, client: int, answer: Answer) -> ClientUpdate | None:
        try:
            content = of_client.content(answer, f"client {client}")
            known = self.roster.infos[client].num_examples
            private = self.config.privacy.level == "example"
            reply = wire.decode_update(content, client, self.sent[client], self.fingerprint, known, private=private)
        except WireError as error:
            self._fail(client, error)
            return None
        update = replace(reply.update, num_examples=min(reply.update.num_examples, self._counted[client]))
        self._moved[client] = guard.moved(update, self.sent[client])
        if self.sent[client].plan.sketch is not None:
            update = replace(update, start=without_values(self.sent[client].adapter))
        self._count(client, content, update, reply.known_base_version)
        return update

    def _count(self, client: int, content: RecordDict, update: ClientUpdate, known_base_version: int) -> None:
        """Write down that this client's reply has come, and can be used."""
        self.crossed(client, "upload", wire.payload_bytes(content))
        self.answers[client] = dict(update.metrics) | {"num-examples": update.num_examples}
        if clock.is_virtual(self.grid):
            self.answers[client] |= {"asked": self.began, "answered": clock.of(self.grid).now()}
            if known_base_version:
                self.answers[client]["base-version"] = known_base_version
        self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=known_base_version)
        if self.keep:
            self.kept.append(update)
        node = self.roster.nodes[client]
        unit = task_of(self.config.model).unit
        emit("client-done", client_id=client, node=node, round=self.number, metrics=self.answers[client], unit=unit)
        if digest := audit.digest(content):
            emit("client-answered", client_id=client, node=node, round=self.number, sha256=digest)

    def _settle_second(
        self, client: int, answer: Answer, like: AdapterState, bases: Mapping[str, Tensor]
    ) -> ClientUpdate | None:
        start = self._start(client)
        try:
            content = of_client.content(answer, f"client {client}")
            adapter = wire.decode_answer(content, client, self.number, like, self.fingerprint)
        except WireError as error:
            self._fail(client, error)
            return None
        examples = int(self.answers[client]["num-examples"])
        update = ClientUpdate(client, adapter, examples, start=without_values(start.adapter))
        self._moved[client] = guard.moved(update, start, bases)
        self.crossed(client, "upload", wire.payload_bytes(content))
        if digest := audit.digest(content):
            node = self.roster.nodes[client]
            emit("client-answered", client_id=client, node=node, round=self.number, sha256=digest)
        return update

    def _start(self, client: int) -> Broadcast:
        """The broadcast from which this client started, made again."""
        return wire.as_received(self.make_broadcast(self.roster.infos[client]), self.config.wire.dtype)

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
        make = partial(roster.message, node, clients, encoded)
        mailbox.post(node, make, others=len(clients) * _METRICS_BYTES)
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


class adding:
    """`with adding(round, "wait_seconds"):` adds the block's wall time to that attribute."""

    def __init__(self, owner: TrainRound, name: str) -> None:
        self._owner, self._name = owner, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, getattr(self._owner, self._name) + time.perf_counter() - self._began)
