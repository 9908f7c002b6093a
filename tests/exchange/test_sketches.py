"""Replies of sketches on the wire: they arrive bit for bit, hold what was asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.sketched_sum import Sketch
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientUpdate, Plan, sketches, wire
from tests.federation import METRICS, tensors_of

BASE = "abc123"
SHAPES = {"q": (30, 40), "v": (40, 30), "tiny": (3, 4)}


def adapter(rank: int, seed: int = 0) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        name: LoraFactors(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), 2.0 / rank)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return AdapterState(lora=lora, tensors={"head.weight": torch.randn(2, 3, generator=g)})


def sent(passes: int = 1, rank: int = 2, room: int = 0, **plan: Any) -> Broadcast:
    return Broadcast(round=3, adapter=adapter(rank), plan=Plan(sketch=Sketch(4, passes, 9, room), **plan))


def reply(broadcast: Broadcast, rank: int = 2) -> RecordDict:
    update = ClientUpdate(7, sketches.made(broadcast.plan, adapter(rank, 1)), num_examples=5, metrics=METRICS)
    return wire.encode_update(update, BASE, number=3)


def bases(width: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.linalg.qr(torch.randn(SHAPES[name][0], width)).Q for name in ("q", "v")}


def answer(broadcast: Broadcast) -> RecordDict:
    made = sketches.made(broadcast.plan, adapter(2, 1), second=True, bases=bases())
    return wire.encode_answer(7, 3, made, BASE)


def read(record: RecordDict, broadcast: Broadcast) -> AdapterState:
    return wire.decode_update(record, 7, broadcast, BASE).update.adapter


def read_answer(record: RecordDict, broadcast: Broadcast) -> AdapterState:
    return wire.decode_answer(record, 7, 3, sketches.asked(broadcast.plan, broadcast.adapter, second=True), BASE)


@settings(deadline=None, max_examples=25)
@given(
    width=st.integers(1, 200),
    passes=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**53 - 1),
    rank=st.integers(0, 9),
)
def test_a_plan_says_how_to_sketch(width: int, passes: int, seed: int, rank: int) -> None:
    broadcast = replace(sent(), plan=Plan(sketch=Sketch(width, passes, seed, rank)))
    assert wire.decode_broadcast(wire.encode_broadcast(broadcast, BASE), BASE).plan == broadcast.plan
    without = replace(broadcast, plan=Plan())
    assert wire.decode_broadcast(wire.encode_broadcast(without, BASE), BASE).plan.sketch is None


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("passes", [1, 2])
def test_both_replies_arrive_bit_for_bit_with_what_was_asked_for(passes: int, room: int) -> None:
    broadcast = sent(passes, room=room)
    got = read(reply(broadcast), broadcast)
    means = {f"{m}|{f}" for m in SHAPES for f in "AB"} if room else set()
    last = {"tiny|D", "head.weight", *means}
    assert got.tensors.keys() == {"q|Y", "v|Y", *(("q|Z", "v|Z", *last) if passes == 1 else ())}
    assert not got.lora
    expected = sketches.made(broadcast.plan, adapter(2, 1))
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in got.tensors.items())
    if passes == 2:
        assert read_answer(answer(broadcast), broadcast).tensors.keys() == {"q|P", "v|P", *last}


def test_modules_that_are_not_trained_in_this_round_are_not_sent() -> None:
    broadcast = sent(modules=frozenset({"q"}))
    assert read(reply(broadcast), broadcast).tensors.keys() == {"q|Y", "q|Z", "head.weight"}


@pytest.mark.parametrize("passes", [1, 2])
def test_replies_have_one_size_at_any_rank(passes: int) -> None:
    sizes = {wire.payload_bytes(reply(sent(passes, rank, room=8), rank)) for rank in (1, 3, 8)}
    assert len(sizes) == 1


def _renamed(arrays: dict[str, Any]) -> None:
    arrays["tensors|q|X"] = arrays.pop("tensors|q|Y")


def _shorter(arrays: dict[str, Any]) -> None:
    arrays["tensors|q|Y"] = arrays["tensors|q|Y"][:, 1:]


def _more(arrays: dict[str, Any]) -> None:
    arrays["tensors|tiny|Y"] = np.zeros((3, 12), np.float32)


def _endless(arrays: dict[str, Any]) -> None:
    arrays["tensors|q|Y"][0, 0] = np.inf


def _doubles(arrays: dict[str, Any]) -> None:
    arrays["tensors|q|Y"] = arrays["tensors|q|Y"].astype(np.float64)


@pytest.mark.parametrize("change", [_renamed, _shorter, _more, _endless, _doubles], ids=lambda f: f.__name__)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    broadcast = sent()
    record = reply(broadcast)
    with tensors_of(record) as arrays:
        change(arrays)
    with pytest.raises(WireError, match="client 7"):
        read(record, broadcast)


def test_factors_in_place_of_sketches_and_sketches_in_place_of_factors_are_refused() -> None:
    plain = replace(sent(), plan=Plan())
    update = ClientUpdate(7, adapter(2, 1), num_examples=5, metrics=METRICS)
    with pytest.raises(WireError, match="client 7 sent other modules than it was sent"):
        read(wire.encode_update(update, BASE, number=3), sent())
    with pytest.raises(WireError, match="client 7 sent other modules than it was sent"):
        read(reply(sent()), plain)
    made = replace(update, adapter=sketches.made(sent().plan, adapter(2, 1)))
    coarse = wire.encode_update(made, BASE, "bf16", number=3)
    with pytest.raises(WireError, match="client 7 sent number format 'bf16', expected fp32"):
        read(coarse, sent())


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sketch-width", -1, "sketch-width"),
        ("sketch-width", 1 << 20, "sketch-width"),
        ("sketch-passes", 3, "sketch-passes"),
        ("sketch-passes", 0, "expected both or neither"),
        ("sketch-width", 0, "expected both or neither"),
        ("sketch-seed", "9", "sketch-seed"),
        ("sketch-seed", 2**60, "sketch-seed"),
        ("sketch-rank", 1 << 20, "sketch-rank"),
    ],
)
def test_a_plan_with_a_wrong_sketch_is_refused(key: str, value: object, says: str) -> None:
    record = wire.encode_broadcast(sent(), BASE)
    record["head"][key] = value
    with pytest.raises(WireError, match=says):
        wire.decode_broadcast(record, BASE)


def test_the_second_question_arrives() -> None:
    plan = replace(sent(2, room=3).plan, modules=frozenset({"q", "tiny"}))
    asked = sketches.question(3, plan, {"q": bases()["q"]}, "abc")
    got = wire.decode_second(wire.encode_second(asked, BASE), BASE)
    assert (got.round, got.run, got.plan) == (3, "abc", plan)
    assert torch.equal(sketches.bases(got, adapter(2))["q"], asked.bases.tensors["q|Q"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"q": (30, 4)}, r"v: the server sent a basis of shape none, expected \(40, 4\)"),
        ({"q": (30, 5), "v": (40, 4)}, r"q: the server sent a basis of shape \(30, 5\), expected \(30, 4\)"),
        ({"q": (40, 4), "v": (40, 4)}, r"q: the server sent a basis of shape \(40, 4\), expected \(30, 4\)"),
    ],
)
def test_bases_that_do_not_fit_are_refused(given: dict[str, tuple[int, int]], says: str) -> None:
    asked = sketches.question(3, sent(2).plan, {name: torch.ones(shape) for name, shape in given.items()}, "")
    with pytest.raises(WireError, match=says):
        sketches.bases(wire.decode_second(wire.encode_second(asked, BASE), BASE), adapter(2))


def test_a_second_question_about_one_pass_is_refused() -> None:
    record = wire.encode_second(sketches.question(3, sent(1).plan, bases(), ""), BASE)
    with pytest.raises(WireError, match="not sketched in two passes"):
        wire.decode_second(record, BASE)


@pytest.mark.parametrize(("key", "value"), [("client-id", 8), ("round", 2), ("dtype", "bf16"), ("base", "def")])
def test_an_answer_of_another_client_round_format_or_base_is_refused(key: str, value: object) -> None:
    record = answer(sent(2))
    record["head"][key] = value
    with pytest.raises(WireError, match="client 7"):
        read_answer(record, sent(2))


def test_a_client_of_a_larger_rank_than_the_means_have_room_for_says_so() -> None:
    with pytest.raises(WireError, match="q: the server asks for means of rank 3, but this client has rank 4"):
        sketches.made(sent(room=3).plan, adapter(4))


@pytest.mark.parametrize("passes", [1, 2])
def test_the_most_bytes_of_a_reply_are_not_far_above_its_own(passes: int) -> None:
    broadcast = sent(passes, room=8)
    own = wire.payload_bytes(reply(broadcast))
    assert own < wire.most_bytes(broadcast) < 3 * own + (1 << 20) + 32 * 1024
