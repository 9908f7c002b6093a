"""One reply for several clients of an edge: the weighted mean of what they sent, and what each says of itself.

The answer of an edge has a part for each of its clients (`parts`). Where the server asked for a sum, the part of the
first client that counts has the mean, and the metrics and the number of examples of each client in it. The parts of the
others say with which client they came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, Error, RecordDict

from fedlora.adapters import AdapterState
from fedlora.common.errors import WireError

from . import parts, wire
from .heads import HEAD
from .messages import Broadcast, ClientUpdate
from .secure import payload
from .wire import Reply

WEIGHT = "weight"
_EXAMPLES, _WITH = "num-examples", "summed-with"
_SUM, _MEMBERS = "sum/", "members/"


def ask(question: RecordDict, weight: int) -> None:
    """Let a question ask for a sum.

    Args:
        question: a client's broadcast, as a message.
        weight: the number of examples with which the client counts at most.
    """
    question[WEIGHT] = ConfigRecord({_EXAMPLES: weight})


def weight_of(question: RecordDict) -> int:
    """The weight with which `ask` asked for a sum; 0 where the server did not.

    Raises:
        WireError: the record is malformed.
    """
    record = question.config_records.get(WEIGHT)
    if record is None:
        return 0
    weight = record.get(_EXAMPLES)
    if len(record) != 1 or type(weight) is not int or not 0 < weight <= wire.MOST_EXAMPLES:
        raise WireError(f"the server sent a malformed weight, expected a number of examples up to {wire.MOST_EXAMPLES}")
    return weight


def without_weight(question: RecordDict) -> RecordDict:
    """The question as its client can read it, with nothing about sums."""
    return RecordDict({name: record for name, record in question.items() if name != WEIGHT})


def largest_ranks(sent: Sequence[Broadcast]) -> dict[str, int]:
    """Module -> the largest rank at which it was sent, of the modules whose factors are sent back."""
    ranks: dict[str, int] = {}
    for one in sent:
        back = one.plan.sent_back(one.adapter).lora if one.plan.sketch is None else {}
        for name, factors in back.items():
            ranks[name] = max(ranks.get(name, 0), factors.rank)
    return ranks


def encode(mean: AdapterState, members: Sequence[Reply], fingerprint: str, number: int) -> dict[int, RecordDict]:
    """The parts of an edge's answer for the clients that are in a sum.

    Args:
        mean: what they sent, at scaling 1, with zeros up to the largest rank of those that were asked.
        members: their replies, in the order of client ids; of the updates the adapters are left out.
        fingerprint: the base model's fingerprint.
        number: number of the round.

    Returns:
        Client id -> its part.
    """
    first, *others = [member.update.client_id for member in members]
    whole = RecordDict()
    for member in members:
        own = replace(member.update, adapter=AdapterState())
        known = member.known_base_version
        part = wire.encode_update(own, fingerprint, known_base_version=known, number=number)
        whole.update({f"{_MEMBERS}{own.client_id}/{name}": record for name, record in part.items()})
    examples = sum(member.update.num_examples for member in members)
    total = replace(members[0].update, adapter=mean, num_examples=examples)
    part = wire.encode_update(total, fingerprint, send=frozenset("ABR"), number=number)
    whole.update({f"{_SUM}{name}": record for name, record in part.items()})
    return {first: whole} | {c: RecordDict({HEAD: ConfigRecord({_WITH: first})}) for c in others}


def joined(content: RecordDict) -> int | None:
    """The client with whose part the numbers of this part's client came; None if it has numbers of its own."""
    first = content.config_records.get(HEAD, {}).get(_WITH)
    return first if type(first) is int and len(content) == 1 else None


def is_sum(content: RecordDict) -> bool:
    """Whether a part has a sum."""
    return any(name.startswith(_SUM) for name in content)


def decode(
    content: RecordDict,
    client_id: int,
    sent: Mapping[int, Broadcast],
    fingerprint: str,
    weights: Mapping[int, int],
    *,
    counted: Collection[int] = (),
    private: bool = False,
) -> tuple[ClientUpdate, list[Reply]]:
    """The mean in a part, as one update at scaling 1, and the replies of the clients in it, without adapters.

    Args:
        content: the part.
        client_id: the client whose part it is; the lowest of those in the sum.
        sent: client id -> the broadcast as it was received, of all clients that were asked in the same message.
        fingerprint: the base model's fingerprint.
        weights: client id -> the largest number of examples with which it counts.
        counted: the clients that are in other sums already.
        private: as in `wire.decode_update`.

    Raises:
        WireError: the part is malformed; a client is in the sum that was not asked, or is in another one; or the
            weights do not add up.
    """
    who = f"the edge of client {client_id}"
    found = {
        key: RecordDict({name.removeprefix(key): value for name, value in content.items() if name.startswith(key)})
        for key in (_SUM, _MEMBERS)
    }
    if sum(map(len, found.values())) != len(content):
        raise WireError(f"{who} sent records beside the sum and its clients")
    members: list[Reply] = []
    for member, part in sorted(parts.split(found[_MEMBERS], who).items()):
        if member not in sent or isinstance(part, Error):
            raise WireError(f"{who} sent a sum with client {member}, which cannot be in it")
        if member in counted:
            raise WireError(f"{who} sent a sum with client {member}, which is in another sum")
        bare = replace(sent[member], adapter=AdapterState(), plan=replace(sent[member].plan, sketch=None))
        members.append(wire.decode_update(part, member, bare, fingerprint, weights[member], private=private))
    if members[0].update.client_id != client_id:
        raise WireError(f"{who} sent a sum in the part of client {client_id}, which is not the first in it")
    examples = sum(member.update.num_examples for member in members)
    like = payload.asked(sent[client_id], largest_ranks([*sent.values()]))
    plan = sent[client_id].plan
    whole = replace(sent[client_id], adapter=sent[client_id].adapter if plan.sketch else like)
    update = wire.decode_update(found[_SUM], client_id, whole, fingerprint, examples, private=private).update
    if update.num_examples != examples:
        raise WireError(f"{who} sent a sum of {update.num_examples} examples, but its clients have {examples}")
    return replace(update, start=None), members
