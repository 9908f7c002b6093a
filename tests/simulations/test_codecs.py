"""Federations that upload in coarse number formats."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.state import difference, map_tensors, sum_of
from fedlora.clients.answering import uploads
from fedlora.clients.node import own_state
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientUpdate, Plan, codec, wire
from tests.federation import METRICS, run_locally, tiny

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}


def state(seed: int, size: float = 1.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    lora = {
        f"m{i}": LoraFactors(
            size * torch.randn(r, 64, generator=generator), size * torch.randn(48, r, generator=generator), 2.0 / r
        )
        for i, r in enumerate((8, 3))
    }
    return AdapterState(lora=lora, tensors={"head.weight": size * torch.randn(2, 33, generator=generator)})


def sent(upload: str = "AB", steady: bool = True, number: int = 1) -> Broadcast:
    return Broadcast(round=number, adapter=state(0), plan=Plan(send=frozenset(upload)), steady=steady)


def decode(adapter: AdapterState, broadcast: Broadcast, dtype: str) -> tuple[AdapterState, int]:
    update = ClientUpdate(client_id=3, adapter=adapter, num_examples=5, metrics=METRICS)
    record = wire.encode_update(update, "base", dtype, broadcast.plan.send)
    return wire.decode_update(record, 3, broadcast, "base").update.adapter, wire.payload_bytes(record)


@pytest.mark.parametrize("upload", ["AB", "B", "A"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8", "int4"])
def test_the_server_reads_the_start_plus_the_rounded_change(tmp_path, dtype, upload):
    broadcast = sent(upload)
    trained = sum_of(broadcast.adapter, state(1, size=0.01))
    to_send, error = uploads.encode_upload(trained, broadcast, dtype, tmp_path)
    got, _ = decode(to_send, broadcast, dtype)
    expected = sum_of(codec.round_trip(to_send, dtype), broadcast.adapter)
    for name, factors in expected.lora.items():
        for part in "AB":
            mine, theirs = getattr(got.lora[name], part), getattr(factors, part)
            assert mine.numel() == (theirs.numel() if part in upload else 0)
            if part in upload:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
                change = getattr(trained.lora[name], part) - getattr(broadcast.adapter.lora[name], part)
                assert float((mine - getattr(trained.lora[name], part)).norm()) < 0.2 * float(change.norm())
    assert 0 < error < 2e-3


def test_fp32_sends_the_bits_that_were_trained(tmp_path):
    trained = state(1)
    to_send, error = uploads.encode_upload(trained, sent(), "fp32", tmp_path)
    got, _ = decode(to_send, sent(), "fp32")
    assert error == 0.0
    assert all(
        torch.equal(got.lora[name].A, f.A) and torch.equal(got.lora[name].B, f.B) for name, f in trained.lora.items()
    )
    assert not list(tmp_path.iterdir())


def test_bytes_fall_with_the_bits(tmp_path):
    big = AdapterState(lora={"m": LoraFactors(torch.randn(64, 512), torch.randn(512, 64), 1.0)})
    broadcast = Broadcast(round=1, adapter=map_tensors(lambda _, x: 0 * x, big))
    sizes = {
        dtype: decode(uploads.encode_upload(big, broadcast, dtype, tmp_path)[0], broadcast, dtype)[1] for dtype in BITS
    }
    for dtype, bits in BITS.items():
        headers_and_scales = 4 * 128 + 2 * 64 * 4
        assert sizes[dtype] == pytest.approx(sizes["fp32"] * bits / 32, abs=headers_and_scales)


def test_what_is_left_out_comes_with_the_next_reply(tmp_path):
    broadcast = sent()
    trained = sum_of(broadcast.adapter, state(1, size=0.01))
    first, _ = uploads.encode_upload(trained, broadcast, "int4", tmp_path)
    left = own_state.load(tmp_path, "left-out", number=2)
    assert left is not None
    torch.testing.assert_close(left.lora["m0"].A, (difference(first, codec.round_trip(first, "int4"))).lora["m0"].A)
    second, _ = uploads.encode_upload(trained, sent(number=2), "int4", tmp_path)
    torch.testing.assert_close(second.lora["m0"].B, first.lora["m0"].B + left.lora["m0"].B)


def test_nothing_is_carried_over_a_restart_or_a_change_of_rank(tmp_path):
    trained = state(1)
    uploads.encode_upload(trained, sent(steady=False), "int4", tmp_path)
    assert own_state.load(tmp_path, "left-out", number=2) is None
    uploads.encode_upload(trained, sent(), "int4", tmp_path)
    smaller = AdapterState(
        lora={n: LoraFactors(f.A[:2], f.B[:, :2], f.scaling) for n, f in trained.lora.items()}, tensors=trained.tensors
    )
    start = AdapterState(
        lora={n: LoraFactors(0 * f.A, 0 * f.B, f.scaling) for n, f in smaller.lora.items()}, tensors=trained.tensors
    )
    to_send, _ = uploads.encode_upload(smaller, Broadcast(round=2, adapter=start, steady=True), "int4", tmp_path)
    torch.testing.assert_close(to_send.lora["m0"].A, smaller.lora["m0"].A)


def test_a_factor_that_is_not_sent_this_round_keeps_what_it_left_out(tmp_path):
    """RoLoRA sends B and A in turn."""
    trained = sum_of(state(0), state(1, size=0.01))
    uploads.encode_upload(trained, sent("B"), "int4", tmp_path)
    before = own_state.load(tmp_path, "left-out", number=2)
    uploads.encode_upload(trained, sent("A", number=2), "int4", tmp_path)
    after = own_state.load(tmp_path, "left-out", number=3)
    assert before is not None
    assert after is not None
    assert torch.equal(after.lora["m0"].B, before.lora["m0"].B)
    assert after.lora["m0"].A.numel()


def test_what_is_not_sent_this_round_keeps_what_it_left_out(tmp_path):
    """With sampled layers, rounds send other modules; with unequal ranks, a kind's groups of parts in turn."""
    start, change = state(0), state(1, size=0.01)
    more = {"m0.ravan_H0": torch.randn(3, 5), "m0.ravan_H1": torch.randn(3, 5)}
    start = AdapterState(lora=start.lora, tensors={**start.tensors, **more})
    trained = sum_of(start, AdapterState(lora=change.lora, tensors={n: 0.01 * t for n, t in start.tensors.items()}))
    errors = []
    for number in (1, 2):
        other = frozenset({f"ravan_H{number % 2}"})
        plan = Plan(modules=frozenset({f"m{number - 1}"}), frozen=other)
        broadcast = Broadcast(round=number, adapter=start, plan=plan, steady=True)
        errors.append(uploads.encode_upload(trained, broadcast, "int4", tmp_path)[1])
    first, after = (own_state.load(tmp_path, "left-out", number=number) for number in (2, 3))
    assert first is not None
    assert after is not None
    assert after.lora.keys() == {"m0", "m1"}
    assert torch.equal(after.lora["m0"].B, first.lora["m0"].B)
    assert torch.equal(after.tensors["m0.ravan_H0"], first.tensors["m0.ravan_H0"])
    assert max(errors) < 0.01  # a module that is not sent counts as no error


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_that_do_not_fit_are_refused(dtype):
    update = ClientUpdate(client_id=3, adapter=state(1), num_examples=5, metrics=METRICS)
    record = wire.encode_update(update, "base", dtype)
    other = Broadcast(
        round=1,
        adapter=AdapterState(lora={n: LoraFactors(f.A[:1], f.B[:, :1], f.scaling) for n, f in state(0).lora.items()}),
    )
    with pytest.raises(WireError, match="client 3"):
        wire.decode_update(record, 3, other, "base")


@pytest.mark.parametrize(
    ("strategy", "ranks", "dtype"),
    [
        ("lora-fair", "4,2,2,1", "bf16"),
        ("lora-fair", "4,2,2,1", "int8"),
        ("flora", "4,2,2,1", "int4"),
        ("rolora", "4", "int4"),
        ("fedsb", "4", "int8"),
    ],
)
def test_coarse_uploads_learn_nearly_what_fp32_learns(tmp_path, tiny_llama, strategy, ranks, dtype):
    results = {}
    for number_format in ("fp32", dtype):
        keys = {"strategy__name": strategy, "lora__ranks": ranks, "train__steps": 6, "federation__rounds": 3}
        config = tiny(tmp_path, tiny_llama, wire__upload_dtype=number_format, run__name=number_format, **keys)
        folder, results[number_format] = run_locally(config)
        assert load_file(folder / "adapter" / "adapter_model.safetensors")
    full, coarse = results["fp32"]["rounds"], results[dtype]["rounds"]
    begin, end = results["fp32"]["baseline"]["loss"], full[-1]["heldout"]["loss"]
    assert abs(coarse[-1]["heldout"]["loss"] - end) < 0.1 * (begin - end)
    if strategy != "fedsb":  # whose cores are smaller than an array's header here
        assert coarse[-1]["upload-bytes"] < 0.85 * full[-1]["upload-bytes"]
    assert full[-1]["codec-error"] is None
    assert all(0 < entry["codec-error"] < 0.15 for entry in coarse if entry["round"])
