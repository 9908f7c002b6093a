"""A round in which edges add up what their clients send, so that one update crosses the border for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import RecordDict

from fedlora.adapters import AdapterState, without_values
from fedlora.adapters.flat import OWN
from fedlora.adapters.means import Means
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientUpdate, summed, wire
from fedlora.exchange.secure import payload
from fedlora.exchange.wire import Reply

from . import answers as of_client
from .answers import Answer
from .collect import TrainRound
from .mailbox import Mailbox


def _at_one(update: ClientUpdate) -> ClientUpdate:
    """An update of a client that no edge added up, at the scaling that sums have."""

    def unscaled(adapter: AdapterState) -> AdapterState:
        return replace(adapter, lora={n: replace(f, A=f.scaling * f.A, scaling=1.0) for n, f in adapter.lora.items()})

    return replace(update, adapter=unscaled(update.adapter), start=update.start and unscaled(update.start))


@dataclass
class SummingRound(TrainRound):
    """A `TrainRound` in which the clients behind an edge have one update.

    Nobody's own update is seen, and so none is judged by how far it moves the model.

    Attributes:
        together: client id -> the clients that were asked in the same message.
        shapes: client id -> its broadcast without values, by which a sum is read.
        of_sum: client id of an update -> the replies that it stands for, without adapters.
    """

    together: dict[int, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[int, Broadcast] = field(default_factory=dict)
    of_sum: dict[int, list[ClientUpdate]] = field(default_factory=dict)
    _in_sums: set[int] = field(default_factory=set)

    def trusted(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """The usable updates, those of edges under the lowest id of their clients."""
        yield from self.updates(chosen)

    def members(self, update: ClientUpdate) -> Iterable[ClientUpdate]:
        """The replies that this one stands for."""
        return self.of_sum.get(update.client_id, [update])

    def _post(self, mailbox: Mailbox, node: int, clients: Sequence[int]) -> None:
        self.together |= dict.fromkeys(clients, tuple(clients))
        super()._post(mailbox, node, clients)

    def _encoded(self, client: int) -> RecordDict:
        content = super()._encoded(client)
        if self.roster.infos[client].edges:
            summed.ask(content, self._counted[client])
            sent = self.sent[client]
            self.shapes[client] = replace(sent, adapter=without_values(sent.adapter), folds=(), control=None)
        return content

    def _settle(self, client: int, answer: Answer) -> ClientUpdate | None:
        if client in self._in_sums:
            return None  # counted with the first of its sum
        if not (self.roster.infos[client].edges and isinstance(answer, RecordDict)):
            update = super()._settle(client, answer)
            return update and _at_one(update)
        sent = {other: self.shapes[other] for other in self.together[client]}
        try:
            if (first := summed.joined(answer)) is not None:
                said = self.failures.get(first, "that has no sum")
                raise WireError(f"client {client} came with client {first}: {said}")
            content = of_client.content(answer, f"client {client}")
            private = self.config.privacy.level == "example"
            update, members = summed.decode(
                content, client, sent, self.fingerprint, self._counted, counted=self._in_sums, private=private
            )
        except WireError as error:
            self._fail(client, error)
            return None
        self.of_sum[client] = []
        for member in members:
            one = member.update.client_id
            self._in_sums.add(one)
            self.of_sum[client].append(replace(member.update, start=sent[one].adapter))
            whole = content if one == client else RecordDict()
            self._count(one, whole, member.update, member.known_base_version)
        return update


def add_up(
    answers: Mapping[int, RecordDict],
    sent: Mapping[int, Broadcast],
    together: Mapping[int, Sequence[int]],
    weights: Mapping[int, int],
    fingerprint: str,
    *,
    private: bool,
) -> dict[int, RecordDict | WireError]:
    """What an edge sends in place of its clients' answers: their mean, in parts as `summed.encode` makes them.

    Args:
        answers: client id -> its answer to its broadcast, or its part of the sum of an edge below.
        sent: client id -> its broadcast, of all that this edge was asked for.
        together: client id -> the clients that were asked in the same message.
        weights: client id -> the largest number of examples with which it counts.
        fingerprint: the base model's fingerprint.
        private: as in `wire.decode_update`.

    Returns:
        Client id -> its part, or why its answer does not count.
    """
    ranks, means = summed.largest_ranks([*sent.values()]), Means()
    members: dict[int, Reply] = {}
    wrong: dict[int, RecordDict | WireError] = {}
    for client, content in sorted(answers.items()):
        if client in members:
            continue
        try:
            if (first := summed.joined(content)) is not None:
                raise WireError(f"client {client} came with client {first}, that has no sum")
            if summed.is_sum(content):
                near = {other: sent[other] for other in together[client]}
                update, found = summed.decode(
                    content, client, near, fingerprint, weights, counted=members, private=private
                )
            else:
                reply = wire.decode_update(content, client, sent[client], fingerprint, private=private)
                examples = min(reply.update.num_examples, weights[client])
                update = replace(reply.update, num_examples=examples)
                found = [Reply(update, reply.known_base_version)]
        except WireError as error:
            wrong[client] = error
            continue
        wide = payload.widened(update.adapter, ranks)
        # in fp64, since the sum is added up again by the server above
        tensors = {name: tensor.double() for name, tensor in OWN.put(wide).items()}
        means.add(tensors, update.num_examples, client)
        members |= {member.update.client_id: member for member in found}
    if not members:
        return wrong
    one_sent = sent[min(members)]
    values = {name: mean.float() for name, mean in means.values.items()}
    mean = OWN.get(values, dict.fromkeys(payload.asked(one_sent, ranks).lora, 1.0))
    return wrong | dict(
        summed.encode(mean, [members[client] for client in sorted(members)], fingerprint, one_sent.round)
    )
