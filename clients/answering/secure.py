"""A client's part in a secure sum: its keys, shares for its neighbours, masked numbers, and shares that it opens.

A client trusts the server with nothing but bringing the messages. It refuses whatever would let the server see one
client's numbers: too few clients in the sum, both secrets of one client, or other numbers under the same masks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict

from fedlora.adapters import keep_factors
from fedlora.common.errors import ConfigError, WireError
from fedlora.exchange import Broadcast, ClientUpdate, secure_messages
from fedlora.exchange.secure import masks, payload
from fedlora.exchange.secure.keys import SECRET, PublicKeys, RoundSecrets
from fedlora.exchange.secure.neighbours import threshold_of
from fedlora.exchange.secure.numbers import to_words
from fedlora.exchange.secure.sharing import split
from fedlora.exchange.secure.signatures import fingerprint_of, sign, signer
from fedlora.exchange.secure_messages import Question
from fedlora.models import base_fingerprint

from ..node import own_state, peers, round_secrets
from ..node.peers import Peers
from ..node.round_secrets import Kept
from ..node.rules import client_id_of, config_of

# With fewer clients in a sum, one of them could compute another's numbers from it.
LEAST = 3
_SELF, _MASKING = "self-mask", "masking"  # a client's two secrets


def keys(content: RecordDict, context: Context) -> RecordDict:
    """Draw the secrets of this try of the round, and send what the others may know of them, signed if it has peers."""
    question, fingerprint, client, folder = _asked(content, context)
    kept = round_secrets.load(folder, question.session)
    if kept is None:
        kept = Kept(question.session, RoundSecrets.draw(question.context))
        round_secrets.save(folder, kept)
    public = kept.secrets.public
    if known := peers.of(context.node_config):
        public = replace(public, signature=sign(known.own, client, public, kept.secrets.context))
    return secure_messages.encode_keys(client, question.session, public, fingerprint)


def shares(content: RecordDict, context: Context) -> RecordDict:
    """A letter for each neighbour, with its shares of this client's two secrets.

    Raises:
        WireError: there are too few neighbours, or a key is nobody's or somebody else's too; or this node has peers,
            and none of them has signed a key.
    """
    question, fingerprint, client, folder = _asked(content, context)
    kept = _kept(folder, question, client)
    public = dict(question.public)
    if kept.public and kept.public != public:
        raise WireError(f"client {client} has split its secrets among other neighbours already; it splits them once")
    _check_keys(client, kept, public)
    if known := peers.of(context.node_config):
        _check_signed(client, kept, public, known)
    if not kept.letters:
        threshold, secrets = threshold_of(len(public)), kept.secrets
        own, masking = (split(secret, [*public], threshold) for secret in (secrets.self_mask, secrets.masking))
        letters = {
            other: secrets.write(own[other] + masking[other], client, other, theirs) for other, theirs in public.items()
        }
        kept = replace(kept, public=public, letters=letters)
        round_secrets.save(folder, kept)
    return secure_messages.encode_letters(client, question.session, kept.letters, fingerprint)


def masked(update: ClientUpdate, sent: Broadcast, folder: Path, fingerprint: str, known: int) -> RecordDict:
    """The answer to a train message, behind masks.

    Args:
        update: what would be sent without them.
        sent: the broadcast, with its `masking`.
        folder: the client's own folder.
        fingerprint: the base model's fingerprint.
        known: the base version whose folds this client will still have in the next round.

    Raises:
        WireError: the round is not one in which this client has split its secrets; too few neighbours have; a number
            is too large for the sum; or something else was sent in this round already.
    """
    client, masking = update.client_id, sent.masking
    if masking is None:
        raise WireError(f"client {client}: this round has no secure sum")
    kept = round_secrets.load(folder, masking.session)
    if kept is None or not kept.public:
        raise WireError(f"client {client} has split no secrets for this round; it is asked for shares first")
    _check_sum(client, kept, masking.neighbours)
    whole = payload.widened(keep_factors(update.adapter, sent.plan.send), masking.ranks)
    vector = payload.to_vector(whole, masking.weight, update.metrics)
    words = to_words(vector, masking.clients, f"client {client}")
    theirs = {other: kept.public[other].masking for other in masking.neighbours}
    hidden = masks.masked(words, client, kept.secrets, theirs)
    digest = hashlib.sha256(hidden.tobytes()).hexdigest()
    if kept.sent and kept.sent != digest:
        raise WireError(
            f"client {client} has sent other numbers in this round already, or the same ones under other neighbours' "
            "masks, and both together would show what the masks hide; the next round has new masks"
        )
    if not kept.sent:
        round_secrets.save(folder, replace(kept, sent=digest))
    return secure_messages.encode_masked(update, hidden, sent, fingerprint, known)


def opened(content: RecordDict, context: Context) -> RecordDict:
    """This client's shares of its neighbours' secrets: of each the one by which the sum can be unmasked.

    Raises:
        WireError: too few clients are in the sum, another secret of a neighbour was opened already, or a letter was
            changed.
    """
    question, fingerprint, client, folder = _asked(content, context)
    kept = _kept(folder, question, client)
    _check_neighbours(client, kept, question.letters)
    _check_sum(client, kept, question.arrived)
    which = {other: _SELF if other in question.arrived else _MASKING for other in question.letters}
    if both := sorted(other for other, secret in which.items() if kept.opened.get(other, secret) != secret):
        raise WireError(
            f"client {client} has opened the other secret of client {both[0]} already; both together would show that "
            "client's numbers"
        )
    found: dict[int, bytes] = {}
    for other, letter in question.letters.items():
        text = kept.secrets.read(letter, other, client, kept.public[other])
        if len(text) != 2 * SECRET:
            raise WireError(f"the letter from client {other} to client {client} has no two shares")
        found[other] = text[:SECRET] if which[other] == _SELF else text[SECRET:]
    round_secrets.save(folder, replace(kept, opened={**kept.opened, **which}))
    return secure_messages.encode_letters(client, question.session, found, fingerprint)


def _asked(content: RecordDict, context: Context) -> tuple[Question, str, int, Path]:
    config, client = config_of(context), client_id_of(context)
    if not config.privacy.secure_sum:
        raise ConfigError(f"client {client}: this run has no secure sums (privacy.secure-sum)")
    fingerprint = base_fingerprint(config.model)
    question = secure_messages.decode_question(content, fingerprint)
    return question, fingerprint, client, own_state.own_folder(context, question.run)


def _kept(folder: Path, question: Question, client: int) -> Kept:
    kept = round_secrets.load(folder, question.session)
    if kept is None or kept.secrets.context != question.context:
        raise WireError(f"client {client} has no secrets of round {question.round} in this session; it missed a phase")
    return kept


def _check_keys(client: int, kept: Kept, public: Mapping[int, PublicKeys]) -> None:
    if client in public or len(public) < LEAST - 1:
        raise WireError(
            f"client {client} is to mask with the clients {sorted(public)}, expected at least {LEAST - 1} others"
        )
    every = [kept.secrets.public, *public.values()]
    if len({key for each in every for key in (each.masking, each.letters)}) < 2 * len(every):
        raise WireError(
            f"client {client}: two clients have one public key in this round, so that one of them is replayed"
        )


def _check_signed(client: int, kept: Kept, public: Mapping[int, PublicKeys], known: Peers) -> None:
    """Raises WireError if keys are signed by no peer, or those of too many neighbours by one and the same.

    Otherwise one peer that works with the server could stand for all others in the sum.
    """
    own = fingerprint_of(known.own.public_key())  # this node may host other clients
    nodes = {fingerprint_of(key): key for key in (*known.others, known.own.public_key())}
    try:
        signed = Counter(signer(nodes, other, keys, kept.secrets.context) for other, keys in public.items())
    except WireError as error:
        raise WireError(f"client {client} takes no part: {error}") from None
    del signed[own]
    most, enough = max(signed.values(), default=0), _enough(public)
    if most >= enough:
        raise WireError(
            f"client {client} takes no part: one node has signed the keys of {most} of its {len(public)} neighbours, "
            f"expected fewer than {enough}, since all others in the sum could be that node's"
        )


def _check_sum(client: int, kept: Kept, others: Collection[int]) -> None:
    """Raises WireError if the others in the sum are not this client's neighbours, or too few of them."""
    _check_neighbours(client, kept, others)
    enough = _enough(kept.public)
    if len(others) < enough:
        raise WireError(
            f"client {client}: only {len(others)} of its {len(kept.public)} neighbours are in the sum, expected at "
            f"least {enough}; a sum of fewer clients would show too much"
        )


def _enough(public: Mapping[int, PublicKeys]) -> int:
    """The number of a client's neighbours that must be in the sum, by the keys of all its neighbours."""
    return max(threshold_of(len(public)), LEAST - 1)


def _check_neighbours(client: int, kept: Kept, others: Collection[int]) -> None:
    if strangers := sorted({*others} - kept.public.keys()):
        raise WireError(f"client {client} has split no secret for client {strangers[0]}, which is no neighbour of it")
