"""The messages of a secure sum: there and back, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientUpdate, Masking, Plan, secure_messages, wire
from fedlora.exchange.secure import payload
from fedlora.exchange.secure.keys import PublicKeys
from fedlora.exchange.secure_messages import Question
from tests.federation import METRICS

BASE, SESSION = "0" * 64, "ab" * 16
KEYS = PublicKeys(b"m" * 32, b"l" * 32, b"s" * 32, b"signature")
QUESTION = Question(3, "run1", SESSION, {4: KEYS, 9: KEYS}, {4: b"a letter", 7: b""}, frozenset({4}))
ADAPTER = AdapterState({"m": LoraFactors(torch.randn(2, 5), torch.randn(4, 2), 2.0)}, {"head": torch.randn(3)})
SENT = Broadcast(3, ADAPTER, masking=Masking(SESSION, 0.5, 10, (1, 2), {"m": 4}))
COUNT = payload.count(payload.asked(SENT, {"m": 4}))
UPDATE = ClientUpdate(5, ADAPTER, 10, metrics=METRICS)


def test_questions_and_answers_come_back_as_they_were():
    question = secure_messages.decode_question(secure_messages.encode_question(QUESTION, BASE), BASE)
    assert question == QUESTION
    keys = secure_messages.decode_keys(secure_messages.encode_keys(5, SESSION, KEYS, BASE), 5, SESSION, BASE)
    assert keys == KEYS
    assert {keys.signature, *(each.signature for each in question.public.values())} == {b"signature"}
    letters = secure_messages.encode_letters(5, SESSION, {1: b"x", 2: b"y"}, BASE)
    assert secure_messages.decode_letters(letters, 5, SESSION, BASE) == {1: b"x", 2: b"y"}


@pytest.mark.parametrize("masking", [bytes(32), KEYS.letters], ids=["zeros", "equal"])
def test_keys_with_which_the_others_can_do_nothing_are_refused_by_the_clients_name(masking):
    """Each of its neighbours would refuse them, and nobody would be left in the sum."""
    record = secure_messages.encode_keys(5, SESSION, replace(KEYS, masking=masking), BASE)
    with pytest.raises(WireError, match="client 5 sent public keys for a secure sum that are equal, or no X25519 keys"):
        secure_messages.decode_keys(record, 5, SESSION, BASE)


def test_a_broadcast_says_how_to_mask():
    assert wire.decode_broadcast(wire.encode_broadcast(SENT, BASE), BASE).masking == SENT.masking
    assert wire.decode_broadcast(wire.encode_broadcast(replace(SENT, masking=None), BASE), BASE).masking is None


def test_masked_numbers_come_back_and_metrics_of_rows_stay_hidden():
    words = np.arange(COUNT, dtype=np.uint64) << np.uint64(40)
    record = secure_messages.encode_masked(UPDATE, words, SENT, BASE)
    reply = secure_messages.decode_masked(record, 5, SENT, BASE, count=COUNT, most_examples=10)
    np.testing.assert_array_equal(reply.words, words)
    assert (reply.num_examples, reply.metrics["train-seconds"]) == (10, 1.5)
    assert reply.metrics.keys() == METRICS.keys() - payload.METRICS.keys()
    assert wire.most_bytes(SENT) > len(record["words"]["words"].data)


@pytest.mark.parametrize("rank", [2, 4])
def test_the_mean_of_vectors_is_the_mean_of_the_updates(rank):
    """Unequal ranks, weights and scalings; against sums of dense products."""
    generator = torch.Generator().manual_seed(0)
    updates, weights = [], [1.0, 0.25, 0.5]
    for r, scaling in ((2, 2.0), (1, 4.0), (2, 0.5)):
        A, B = torch.randn(r, 5, generator=generator), torch.randn(4, r, generator=generator)
        updates.append(AdapterState({"m": LoraFactors(A, B, scaling)}, {"head": torch.randn(3, generator=generator)}))
    wide = [payload.widened(update, {"m": rank}) for update in updates]
    for update, whole in zip(updates, wide, strict=True):
        f, w = update.lora["m"], whole.lora["m"]
        torch.testing.assert_close(w.scaling * w.B @ w.A, f.scaling * f.B @ f.A)
    metrics = [dict.fromkeys(payload.METRICS, float(k)) for k in range(3)]
    vectors = [payload.to_vector(*each) for each in zip(wide, weights, metrics, strict=True)]
    mean, found = payload.to_mean(sum(vectors), wide[0])
    expected = sum(w * u.tensors["head"].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
    torch.testing.assert_close(mean.tensors["head"], expected)
    A = sum(w * u.lora["m"].A.double() for w, u in zip(weights, wide, strict=True)) / sum(weights)
    torch.testing.assert_close(mean.lora["m"].A, A)
    assert found["train-loss"] == pytest.approx((0.25 * 1 + 0.5 * 2) / 1.75)


def test_a_larger_rank_has_no_place():
    with pytest.raises(WireError, match="m: factors of rank 2 have no place in a secure sum of rank 1"):
        payload.widened(ADAPTER, {"m": 1})


def test_a_factor_that_is_not_sent_takes_no_words():
    sent = replace(SENT, plan=Plan(frozenset("B"), frozenset("B")))
    assert payload.count(payload.asked(sent, {"m": 4})) == 4 * 4 + 3 + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": "zz"}, "sent session 'zz', expected 32 hexadecimal digits"),
        ({"session": "cd" * 16}, "sent session 'cdcd"),
        ({"client-id": 6}, "sent client id 6, expected 5"),
        ({"num-examples": 11}, "sent num-examples 11, expected an integer from 0 to 10"),
        ({"known-base-version": 3}, "sent known-base-version 3, expected 0 or 0"),
        ({"more": 1}, "the message lacks, or should not have"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change, message):
    record = secure_messages.encode_masked(UPDATE, np.zeros(COUNT, np.uint64), SENT, BASE)
    record["head"] = ConfigRecord(dict(record["head"]) | change)
    with pytest.raises(WireError, match=message):
        secure_messages.decode_masked(record, 5, SENT, BASE, count=COUNT, most_examples=10)


def test_too_many_or_too_few_words_and_losses_in_the_clear_are_refused():
    record = secure_messages.encode_masked(UPDATE, np.zeros(COUNT + 1, np.uint64), SENT, BASE)
    about: dict[str, Any] = {"count": COUNT, "most_examples": 10}
    with pytest.raises(WireError, match=f"sent {8 * COUNT + 8} bytes of masked numbers, expected {8 * COUNT}"):
        secure_messages.decode_masked(record, 5, SENT, BASE, **about)
    record = secure_messages.encode_masked(UPDATE, np.zeros(COUNT, np.uint64), SENT, BASE)
    record["metrics"]["train-loss"] = 0.7
    with pytest.raises(WireError, match="sent metric 'train-loss', expected only"):
        secure_messages.decode_masked(record, 5, SENT, BASE, **about)
