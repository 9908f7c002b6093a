"""Spectra of updates against those of dense matrices."""

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.algebra import singular_values


def factors(d_out: int, rank: int, d_in: int, scaling: float = 0.5, seed: int = 0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(A=torch.randn(rank, d_in, generator=g), B=torch.randn(d_out, rank, generator=g), scaling=scaling)


@pytest.mark.parametrize(("d_out", "rank", "d_in"), [(20, 4, 30), (30, 1, 20), (6, 6, 9), (6, 40, 9), (9, 12, 6)])
@pytest.mark.parametrize("scaling", [2.0, -0.25])
def test_they_are_those_of_the_dense_matrix_descending(d_out, rank, d_in, scaling):
    f = factors(d_out, rank, d_in, scaling)
    got = singular_values(AdapterState(lora={"m": f}))["m"]
    expected = torch.linalg.svdvals(delta(f).double())[:rank].tolist()
    assert got == pytest.approx(expected, rel=1e-5)
    assert got == sorted(got, reverse=True)


def test_only_the_largest_come_back_and_a_core_counts():
    f = factors(40, 36, 50)
    cored = LoraFactors(A=f.A, B=f.B, scaling=f.scaling, R=torch.diag(torch.arange(36.0)))
    adapter = AdapterState(lora={"m": cored, "n": f}, tensors={"head": f.A})
    got = singular_values(adapter)
    assert [*got] == ["m", "n"]
    assert [len(s) for s in got.values()] == [32, 32]
    core = f.scaling * f.B @ torch.diag(torch.arange(36.0)) @ f.A
    assert got["m"] == pytest.approx(torch.linalg.svdvals(core.double())[:32].tolist(), rel=1e-5)
    assert singular_values(adapter, most=3)["n"] == got["n"][:3]
    assert len(singular_values(adapter, most=0)["n"]) == 36


def test_rounding_is_left_out_and_no_update_has_no_values():
    f = factors(12, 2, 10)
    twice = LoraFactors(A=torch.cat([f.A, f.A]), B=torch.cat([f.B, f.B], dim=1), scaling=f.scaling)
    nothing = LoraFactors(A=f.A, B=torch.zeros_like(f.B), scaling=1.0)
    got = singular_values(AdapterState(lora={"twice": twice, "nothing": nothing, "once": f}))
    assert got["twice"] == pytest.approx([2 * s for s in got["once"]], rel=1e-5)
    assert got["nothing"] == []
