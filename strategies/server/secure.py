"""A round whose replies are masked: its phases, the sum of what arrives, and the one reply that the strategy sees.

See `fedlora.exchange.secure` for the protocol, and `clients/answering/secure.py` for what clients refuse.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from flwr.app import RecordDict

from fedlora.adapters import AdapterState, map_tensors, without_values
from fedlora.common.errors import RunError, WireError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Masking, secure_messages, sketches
from fedlora.exchange.secure import payload
from fedlora.exchange.secure.keys import PublicKeys
from fedlora.exchange.secure.neighbours import graph
from fedlora.exchange.secure.numbers import Words, to_numbers
from fedlora.exchange.secure.opening import Participants
from fedlora.exchange.secure_messages import Question

from . import answers as of_client
from .answers import Answer
from .collect import TrainRound
from .mailbox import SMALL, Mailbox

SUM = -1  # the client id of a sum
_WORDS = "words"
_Made = TypeVar("_Made")


@dataclass
class SecureRound(TrainRound):
    """A `TrainRound` of which the server reads only the sum.

    `trusted` gives one update: the weighted mean of the replies, at the server's ranks and scaling 1. Each client's
    train-loss, and other metrics that tell of its rows, are that of the sum.

    Attributes:
        run: key of the run.
        server: the server's adapter before the round, whose ranks are the largest.
        counted: client id -> what is known of a client whose numbers are in the sum.
    """

    run: str = ""
    server: AdapterState = field(default_factory=AdapterState)
    counted: dict[int, ClientUpdate] = field(default_factory=dict)
    _session: str = field(default_factory=lambda: secrets.token_hex(16))
    _like: AdapterState = field(default_factory=AdapterState)
    _neighbours: int = 0  # the largest number that a client has

    def trusted(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """The mean of the replies as one reply; none if too few clients answered to begin.

        Raises:
            RunError: so many clients have dropped out that the sum cannot be unmasked.
        """
        blank = Question(self.number, self.run, self._session)
        near = graph(chosen, self._session)
        self._neighbours = max(map(len, near.values()))
        public = dict(self._asked("keys", near, lambda client: blank, self._keys))
        near = {client: [other for other in near[client] if other in public] for client in public}
        letters = dict(
            self._asked(
                "shares",
                near,
                lambda client: replace(blank, public={other: public[other] for other in near[client]}),
                partial(self._letters, near),
            )
        )
        who = Participants(blank.context, public, {client: near[client] for client in letters})
        if not letters:
            return
        self._masking_of(who, len(chosen))
        total: Words | None = None
        for update in self.updates(sorted(letters)):
            words = update.adapter.tensors[_WORDS].numpy().view(np.uint64)
            total = words.copy() if total is None else total + words
            self.counted[update.client_id] = replace(update, adapter=AdapterState())
        if total is None:
            return
        yield self._mean(self._unmasked(blank, who, letters, total))

    def members(self, update: ClientUpdate) -> Iterable[ClientUpdate]:
        """What is known of the clients whose numbers are in the sum."""
        return self.counted.values()

    def _unmasked(
        self, blank: Question, who: Participants, letters: Mapping[int, Mapping[int, bytes]], total: Words
    ) -> Words:
        arrived = frozenset(self.counted)

        def question(client: int) -> Question:
            senders = [other for other in who.holders[client] if other in letters]
            mine = {other: letters[other][client] for other in senders}
            return replace(blank, letters=mine, arrived=arrived & {*senders})

        opened: dict[int, dict[int, bytes]] = {client: {} for client in letters}
        for client, found in self._asked("open", sorted(arrived), question, self._texts):
            for other in found.keys() & set(who.holders[client]) & opened.keys():
                opened[other][client] = found[other]
        try:
            return who.unmasked(total, arrived, opened)
        except WireError as error:
            why = "; ".join(list(self.failures.values())[-3:])
            raise RunError(
                f"round {self.number}: the secure sum cannot be unmasked, and nothing of it is known: {error}"
                f"{f' ({why})' if why else ''}"
            ) from None

    def _mean(self, words: Words) -> ClientUpdate:
        adapter, metrics = payload.to_mean(to_numbers(words), self._like)
        # sketches are added up in fp64
        adapter = map_tensors(lambda name, tensor: tensor if sketches.is_sketch(name) else tensor.float(), adapter)
        metrics = {} if self.config.privacy.level == "example" else metrics  # nothing outside that mechanism
        for client, update in self.counted.items():
            self.answers[client] = dict(update.metrics) | metrics | {"num-examples": update.num_examples}
        return ClientUpdate(SUM, adapter, sum(update.num_examples for update in self.counted.values()))

    def _masking_of(self, who: Participants, clients: int) -> None:
        """From now on, each broadcast says how its client masks, and replies are read as masked ones."""
        weights = self.weights(sorted(who.holders))
        largest, plain = max(weights.values()), self.make_broadcast
        one = plain(self.roster.infos[min(weights)])
        sent = {} if one.plan.sketch else one.plan.sent_back(one.adapter).lora
        ranks = {name: self.server.lora[name].rank for name in sent}
        self._like = payload.asked(one, ranks)

        def masked(info: ClientInfo) -> Broadcast:
            neighbours, weight = tuple(who.masked_with(info.client_id)), weights[info.client_id] / largest
            return replace(plain(info), masking=Masking(self._session, weight, clients, neighbours, ranks))

        self.make_broadcast = masked

    def _settle(self, client: int, answer: Answer) -> ClientUpdate | None:
        sent = self.sent[client]
        try:
            content = of_client.content(answer, f"client {client}")
            reply = secure_messages.decode_masked(
                content,
                client,
                sent,
                self.fingerprint,
                count=payload.count(self._like),
                most_examples=self.roster.infos[client].num_examples,
            )
        except WireError as error:
            self._fail(client, error)
            return None
        words = torch.from_numpy(reply.words.view(np.int64))
        update = ClientUpdate(
            client_id=client,
            adapter=AdapterState(tensors={_WORDS: words}),
            num_examples=min(reply.num_examples, self._counted[client]),
            base_version=sent.base_version,
            metrics=reply.metrics,
            start=without_values(sent.adapter),
        )
        self._count(client, content, update, reply.known_base_version)
        return update

    def _asked(
        self,
        phase: str,
        clients: Sequence[int] | Mapping[int, object],
        question: Callable[[int], Question],
        read: Callable[[int, RecordDict], _Made],
    ) -> Iterator[tuple[int, _Made]]:
        """What each client answers in a phase; a client that gives no answer, or a wrong one, has failed."""

        def encoded(client: int) -> RecordDict:
            record = secure_messages.encode_question(question(client), self.fingerprint)
            self.crossed(client, "download", secure_messages.size(record))
            return record

        asked = self.roster.by_node(sorted(clients))
        mailbox = Mailbox(self.grid, f"query.{phase}", str(self.number), self.config.federation.round_timeout)
        for node, of_node in asked.items():
            most = secure_messages.most_bytes(len(of_node), self._neighbours)
            message = partial(self.roster.message, node, of_node, encoded)
            mailbox.post(node, message, lambda most=most: max(SMALL, most), most)
        for node, reply in mailbox.replies():
            for client, answer in self.roster.answers(node, asked[node], reply).items():
                try:
                    content = of_client.content(answer, f"client {client}")
                    self.crossed(client, "upload", secure_messages.size(content))
                    yield client, read(client, content)
                except WireError as error:
                    self._fail(client, error)

    def _keys(self, client: int, content: RecordDict) -> PublicKeys:
        return secure_messages.decode_keys(content, client, self._session, self.fingerprint)

    def _texts(self, client: int, content: RecordDict) -> dict[int, bytes]:
        return secure_messages.decode_letters(content, client, self._session, self.fingerprint)

    def _letters(self, near: Mapping[int, Sequence[int]], client: int, content: RecordDict) -> dict[int, bytes]:
        letters = self._texts(client, content)
        if letters.keys() != {*near[client]}:
            raise WireError(f"client {client} sent letters to {len(letters)} clients, expected {len(near[client])}")
        return letters
