"""Number formats: what comes back, how far it is off, and error feedback."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.flat import OWN
from fedlora.adapters.state import difference, sum_of
from fedlora.exchange import codec

some = settings(max_examples=50, deadline=None)


def state(seed: int, rank: int = 3, size: float = 1.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator)

    return AdapterState(
        lora={"m": LoraFactors(normal(rank, 7), normal(5, rank), 2.0), "n": LoraFactors(normal(1, 4), normal(4, 1), 1)},
        tensors={"head.weight": normal(2, 3), "head.bias": normal(2)},
    )


@some
@given(rows=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 99), largest=st.sampled_from([7, 127]))
def test_codes_are_the_nearest_and_the_error_is_half_a_step(rows: int, width: int, seed: int, largest: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    codes, scales = codec.code(x, largest)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == largest
    for row in range(rows):
        step = max(abs(float(v)) for v in x[row]) / largest
        assert float(scales[row]) == pytest.approx(step, rel=1e-6)
        for column in range(width):
            assert abs(float(codes[row, column]) * step - float(x[row, column])) <= 0.5001 * step


def test_a_row_of_zeros_stays_zero_and_no_row_spoils_another() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-6, -1e-6], [1e6, 3.0]])
    codes, scales = codec.code(x, 127)
    back = codes * scales[:, None]
    assert torch.equal(back[0], torch.zeros(2))
    torch.testing.assert_close(back[1], x[1])


@some
@given(values=st.lists(st.lists(st.integers(-7, 7), min_size=3, max_size=3), min_size=1, max_size=4), cut=st.booleans())
def test_unpack_reverses_pack(values: list[list[int]], cut: bool) -> None:
    codes = torch.tensor(values, dtype=torch.int8)[:, : 2 if cut else 3]
    packed = codec.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(values), (codes.shape[1] + 1) // 2)
    assert torch.equal(codec.unpack(packed, codes.shape[1]), codes)


@pytest.mark.parametrize(
    ("name", "bound"), [("fp32", 0.0), ("fp16", 1e-3), ("bf16", 8e-3), ("int8", 8e-3), ("int4", 0.15), ("sparse", 0.0)]
)
def test_what_is_read_is_near_to_what_was_sent(name: str, bound: float) -> None:
    sent = state(0)
    read = codec.round_trip(sent, name)
    for module, factors in sent.lora.items():
        assert read.lora[module].scaling == factors.scaling
        for left, right in ((read.lora[module].A, factors.A), (read.lora[module].B, factors.B)):
            assert left.shape == right.shape
            assert float((left - right).norm()) <= bound * float(right.norm())
    for key, tensor in sent.tensors.items():
        assert read.tensors[key].shape == tensor.shape
        assert float((read.tensors[key] - tensor).norm()) <= bound * float(tensor.norm())


def test_a_rank_has_a_scale_of_its_own_in_both_factors() -> None:
    """Row j of A and column j of B: a client with one strong component does not flatten its others."""
    scale = torch.tensor([1e4, 1.0, 1e-4])
    f = LoraFactors(scale[:, None] * torch.randn(3, 40), torch.randn(30, 3) * scale, 1.0)
    read = codec.round_trip(AdapterState(lora={"m": f}), "int8").lora["m"]
    for j in range(3):
        assert float((read.A[j] - f.A[j]).norm()) < 0.01 * float(f.A[j].norm())
        assert float((read.B[:, j] - f.B[:, j]).norm()) < 0.01 * float(f.B[:, j].norm())


def test_sum_and_difference_keep_empty_factors_and_scalings() -> None:
    left, right = state(1), state(2)
    only_b = AdapterState(lora={"m": LoraFactors(torch.empty(0, 0), left.lora["m"].B, 2.0)}, tensors=left.tensors)
    got = sum_of(difference(only_b, right), right)
    assert got.lora.keys() == {"m"}
    assert got.lora["m"].A.numel() == 0
    assert got.lora["m"].scaling == 2.0
    torch.testing.assert_close(got.lora["m"].B, left.lora["m"].B)
    torch.testing.assert_close(got.tensors["head.bias"], left.tensors["head.bias"])


def test_error_feedback_makes_up_for_entries_that_are_not_the_largest() -> None:
    """A small change that comes back in every round is sent in the end, though no reply has room for it at first."""
    size = torch.tensor([[8.0, 1.0, 4.0, 0.5]])
    wanted = AdapterState(tensors={"w": size})
    left, read = AdapterState(tensors={"w": torch.zeros(1, 4)}), torch.zeros(1, 4)
    for _ in range(200):
        meant = sum_of(wanted, left)
        sent = codec.largest(meant, 0.25)
        assert int(sent.tensors["w"].count_nonzero()) == 1
        left, read = difference(meant, sent), read + sent.tensors["w"]
    torch.testing.assert_close(read + left.tensors["w"], 200 * size)
    assert float((read - 200 * size).abs().max()) < 20  # of up to 1600


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_error_feedback_makes_up_for_what_was_left_out(name: str) -> None:
    """The sum of what was read stays within one reply's error of the sum of what was meant."""
    meant, read, left = state(0, size=0.0), state(0, size=0.0), state(0, size=0.0)
    for round in range(30):
        step = state(round, size=0.1)
        meant = sum_of(meant, step)
        wanted = sum_of(step, left)
        arrived = codec.round_trip(wanted, name)
        left, read = difference(wanted, arrived), sum_of(read, arrived)
    for module, factors in meant.lora.items():
        torch.testing.assert_close(read.lora[module].A + left.lora[module].A, factors.A, rtol=1e-4, atol=1e-5)
        assert float((read.lora[module].A - factors.A).norm()) < 0.1 * float(factors.A.norm())


@some
@given(values=st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0]), max_size=40), run=st.integers(0, 1200))
def test_gaps_tell_where_the_entries_are(values: list[float], run: int) -> None:
    """Also over runs of zeros that are longer than a byte can say, at the start, between and at the end."""
    row = np.array([*[0.0] * run, *values, *[0.0] * run, 3.0, *[0.0] * run])
    places = np.flatnonzero(row)
    coded = codec.gaps(places, len(row))
    assert len(coded) <= len(places) + len(row) // 255
    found = codec.entries(coded, len(row))
    assert found is not None
    assert found.tolist() == places.tolist()
    for wrong in (len(row) + 256, len(row) - 256 - run):
        assert codec.entries(coded, wrong) is None
    assert codec.entries(codec.gaps(np.zeros(0, np.int64), run), run) is not None


@some
@given(seed=st.integers(0, 99), share=st.sampled_from([1e-4, 0.1, 0.5, 0.99, 1.0]))
def test_the_largest_entries_over_all_tensors_are_kept(seed: int, share: float) -> None:
    whole = state(seed)
    kept = OWN.put(codec.largest(whole, share))
    entries = torch.cat([tensor.flatten() for tensor in OWN.put(whole).values()])
    count = math.ceil(share * len(entries))
    least = entries.abs().sort(descending=True).values[count - 1]
    for name, tensor in OWN.put(whole).items():
        assert torch.equal(kept[name], tensor.where(tensor.abs() >= least, 0.0))
