"""The messages of a secure sum besides training: keys, shares and opening; see `fedlora.exchange.secure`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.common.errors import WireError

from .fields import METRICS_RECORD, Fields, metrics_record, read_metrics, require
from .heads import COMMON, HEAD, checked_head, head_of, only
from .messages import Broadcast, ClientUpdate
from .secure.keys import PublicKeys, is_usable
from .secure.numbers import Words
from .secure.payload import METRICS as HIDDEN
from .wire import TRAIN_METRICS

_SERVER = "the server"
_ABOUT = ("round", "run", "session")
_KEYS = ("masking", "letters", "self-mask")
_SIGNATURE = "signature"
_MASKED = frozenset({"client-id", "num-examples", "known-base-version", "session"})
_WORDS = "words"
_MOST_ID = 2**64 - 1  # Flower's node ids
_LONGEST = 200  # bytes of a letter, a share or a signature
# Bytes of an answer without letters, or of an error's text; and of a letter of two shares, with its client's id.
_ROOM, _LETTER = 4096, 64
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Question:
    """A question of one phase of a secure sum. Each phase uses some of these.

    Args:
        round: number of the round, from 1.
        run: key of the run, as in the broadcast.
        session: names this try of the round.
        public: in the phase shares, the public keys of the client's neighbours by id.
        letters: in the phase open, by id of the sender, the letters with shares for this client.
        arrived: in the phase open, the senders whose numbers are in the sum; the numbers of the others are missing.
    """

    round: int
    run: str
    session: str
    public: Mapping[int, PublicKeys] = field(default_factory=dict)
    letters: Mapping[int, bytes] = field(default_factory=dict)
    arrived: frozenset[int] = frozenset()

    @property
    def context(self) -> bytes:
        """What goes into all keys of this try of the round."""
        return f"{self.run}/{self.round}/{self.session}".encode()


@dataclass(frozen=True)
class MaskedReply:
    """A client's answer to a train message, behind masks.

    Args:
        words: its masked numbers, [count].
        num_examples, metrics: as in a `ClientUpdate`, without the metrics that are in the sum.
        known_base_version: as in `wire.Reply`.
    """

    words: Words
    num_examples: int
    metrics: Mapping[str, float]
    known_base_version: int


def encode_question(question: Question, fingerprint: str) -> RecordDict:
    """A question to one client."""
    ids, public = list(question.public), list(question.public.values())
    head = head_of(fingerprint, "fp32") | {
        "round": question.round,
        "run": question.run,
        "session": question.session,
        "neighbours": ids,
        "masking": [keys.masking for keys in public],
        "letters": [keys.letters for keys in public],
        "self-mask": [keys.self_mask for keys in public],
        _SIGNATURE: [keys.signature for keys in public],
        "senders": list(question.letters),
        "texts": list(question.letters.values()),
        "arrived": sorted(question.arrived),
    }
    return RecordDict({HEAD: ConfigRecord(cast("Any", head))})


def decode_question(record: RecordDict, fingerprint: str) -> Question:
    """A question as a client reads it.

    Raises:
        WireError: it is malformed, of another protocol version, or made for another base model.
    """
    fields = checked_head(record, fingerprint, _SERVER)
    only(record, fields, COMMON | {*_ABOUT, "neighbours", *_KEYS, _SIGNATURE, "senders", "texts", "arrived"})
    parts = [_bytes(fields, key) for key in (*_KEYS, _SIGNATURE)]
    if len({*map(len, parts)}) > 1:
        counts = ", ".join(str(len(part)) for part in parts)
        raise WireError(f"{_SERVER} sent {counts} keys and signatures, expected as many of each")
    public = [PublicKeys(*each) for each in zip(*parts, strict=True)]
    return Question(
        round=fields.positive("round", _MOST_ID),
        run=fields.run_key(),
        session=fields.session(),
        public=_by_id(fields, "neighbours", public),
        letters=_by_id(fields, "senders", _bytes(fields, "texts")),
        arrived=frozenset(fields.items("arrived", int)),
    )


def encode_keys(client_id: int, session: str, public: PublicKeys, fingerprint: str) -> RecordDict:
    """A client's answer in the phase keys."""
    keys: dict[str, Any] = dict(zip(_KEYS, (public.masking, public.letters, public.self_mask), strict=True))
    return _answer(client_id, session, keys | {_SIGNATURE: public.signature}, fingerprint)


def decode_keys(record: RecordDict, client_id: int, session: str, fingerprint: str) -> PublicKeys:
    """The public keys in a client's answer.

    Raises:
        WireError: the answer is malformed, or is from another client or for another session; or its neighbours could
            do nothing with a key.
    """
    fields = _answered(record, client_id, session, fingerprint, (*_KEYS, _SIGNATURE))
    masking, letters, self_mask = (fields.octets(key, 32) for key in _KEYS)
    if masking == letters or not (is_usable(masking) and is_usable(letters)):
        raise WireError(f"client {client_id} sent public keys for a secure sum that are equal, or no X25519 keys")
    return PublicKeys(masking, letters, self_mask, fields.octets_up_to(_SIGNATURE, _LONGEST))


def encode_letters(client_id: int, session: str, letters: Mapping[int, bytes], fingerprint: str) -> RecordDict:
    """A client's answer in the phase shares: a letter for each neighbour; or in the phase open: shares by owner."""
    return _answer(client_id, session, {"ids": list(letters), "texts": list(letters.values())}, fingerprint)


def decode_letters(record: RecordDict, client_id: int, session: str, fingerprint: str) -> dict[int, bytes]:
    """The letters or shares in a client's answer, by the id that each is for or about.

    Raises:
        WireError: the answer is malformed, or is from another client or for another session.
    """
    fields = _answered(record, client_id, session, fingerprint, ("ids", "texts"))
    return _by_id(fields, "ids", _bytes(fields, "texts"))


def encode_masked(update: ClientUpdate, words: Words, sent: Broadcast, fingerprint: str, known: int = 0) -> RecordDict:
    """A client's masked answer to a train message.

    Args:
        update: its adapter is not sent.
        words: the masked numbers.
        sent: the broadcast that it answers, with its `masking`.
        fingerprint: the base model's fingerprint.
        known: the base version whose folds this client will still have in the next round (0: none).
    """
    head = head_of(fingerprint, "fp32") | {
        "client-id": update.client_id,
        "num-examples": update.num_examples,
        "known-base-version": known,
        "session": _session(sent),
    }
    data = words.astype("<u8", copy=False).tobytes()
    array = Array(dtype="uint8", shape=(len(data),), stype="words", data=data)
    metrics = {name: value for name, value in update.metrics.items() if name not in HIDDEN}
    record = RecordDict({HEAD: ConfigRecord(cast("Any", head)), _WORDS: ArrayRecord({_WORDS: array})})
    record[METRICS_RECORD] = metrics_record(metrics, TRAIN_METRICS)
    return record


def decode_masked(
    record: RecordDict, client_id: int, sent: Broadcast, fingerprint: str, *, count: int, most_examples: int
) -> MaskedReply:
    """The masked numbers in a client's answer, and what it says in the clear.

    Args:
        record: the answer.
        client_id: the client that should have sent it.
        sent: the broadcast to this client, with its `masking`.
        fingerprint: the base model's fingerprint.
        count: the number of words that are expected.
        most_examples: the largest number of examples that the client may claim.

    Raises:
        WireError: the answer is malformed, or is from another client or for another session; or a metric is unknown, is
            missing, or belongs into the sum.
    """
    who = f"client {client_id}"
    fields = checked_head(record, fingerprint, who)
    only(record, fields, COMMON | _MASKED, (), (_WORDS, METRICS_RECORD))
    fields.expect("client id", fields.integer("client-id"), client_id)
    fields.expect("session", fields.session(), _session(sent))
    known = fields.integer("known-base-version")
    if known not in (0, sent.base_version):
        raise WireError(f"{who} sent known-base-version {known}, expected 0 or {sent.base_version}")
    metrics = read_metrics(record, who, TRAIN_METRICS - HIDDEN.keys())
    require(metrics, TRAIN_METRICS - HIDDEN.keys(), who)
    arrays = record.array_records.get(_WORDS)
    data = b"" if arrays is None or list(arrays) != [_WORDS] else arrays[_WORDS].data
    if len(data) != 8 * count:
        raise WireError(f"{who} sent {len(data)} bytes of masked numbers, expected {8 * count}")
    words = np.frombuffer(data, dtype="<u8").astype(np.uint64)
    return MaskedReply(words, fields.positive("num-examples", most_examples), metrics, known)


def most_bytes(clients: int, neighbours: int) -> int:
    """An upper bound for a node's answer in a phase other than training, in Flower's serialization.

    Args:
        clients: the number of its clients that are asked.
        neighbours: the largest number of a client's neighbours.
    """
    return clients * (_ROOM + neighbours * _LETTER)


def size(record: RecordDict) -> int:
    """The number of bytes of all keys, letters and shares in a message."""
    lists = [value if isinstance(value, list) else [value] for value in record.config_records[HEAD].values()]
    return sum(len(each) for items in lists for each in items if isinstance(each, bytes))


def _session(sent: Broadcast) -> str:
    if sent.masking is None:
        raise WireError("this round has no secure sum")
    return sent.masking.session


def _answer(client_id: int, session: str, content: dict[str, Any], fingerprint: str) -> RecordDict:
    head = head_of(fingerprint, "fp32") | {"client-id": client_id, "session": session} | content
    return RecordDict({HEAD: ConfigRecord(cast("Any", head))})


def _answered(record: RecordDict, client_id: int, session: str, fingerprint: str, keys: tuple[str, ...]) -> Fields:
    fields = checked_head(record, fingerprint, f"client {client_id}")
    only(record, fields, COMMON | {"client-id", "session", *keys})
    fields.expect("client id", fields.integer("client-id"), client_id)
    fields.expect("session", fields.session(), session)
    return fields


def _bytes(fields: Fields, key: str) -> list[bytes]:
    found = fields.items(key, bytes)
    if any(len(each) > _LONGEST for each in found):
        raise WireError(f"{fields.who} sent {key} of more than {_LONGEST} bytes each")
    return found


def _by_id(fields: Fields, key: str, values: list[_Made]) -> dict[int, _Made]:
    ids = fields.items(key, int)
    if len(ids) != len(values) or len(set(ids)) != len(ids):
        raise WireError(f"{fields.who} sent {len(values)} values for {len(ids)} {key}, expected one for each, once")
    return dict(zip(ids, values, strict=True))
