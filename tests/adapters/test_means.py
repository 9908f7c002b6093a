"""Running means against sums over all replies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from tests.naive import dense as naive


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=5), seed=st.integers(0, 99), some=st.booleans())
def test_each_tensor_is_the_mean_over_the_clients_that_sent_it(weights: list[int], seed: int, some: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    sent = [{"w": torch.randn(3, 4, generator=g).double(), "v": torch.randn(2, generator=g).double()} for _ in weights]
    if some:
        del sent[-1]["v"]
    means = Means()
    for client, (tensors, weight) in enumerate(zip(sent, weights, strict=True)):
        means.add(tensors, weight, client)
    for name in {name for tensors in sent for name in tensors}:
        having = [(t[name], w) for t, w in zip(sent, weights, strict=True) if name in t]
        expected = naive.mean([t for t, _ in having], [w / sum(w for _, w in having) for _, w in having])
        torch.testing.assert_close(means.values[name], expected, rtol=1e-9, atol=1e-9)


def test_the_mean_of_equal_tensors_is_bitwise_equal_and_a_copy() -> None:
    w = torch.randn(3, 7)
    for count in (1, 2, 3, 7):
        means = Means()
        for client in range(count):
            means.add({"w": w}, 0.1 + client, client)
        assert torch.equal(means.values["w"], w)
        assert means.values["w"].data_ptr() != w.data_ptr()


def test_fault_1_a_mean_never_broadcasts_a_rank_1_client() -> None:
    means = Means()
    means.add({"w": torch.ones(3, 4)}, 1, 0)
    with pytest.raises(StrategyError, match=r"w: client 1 sent shape \[1, 4\], others sent \[3, 4\]"):
        means.add({"w": torch.ones(1, 4)}, 1, 1)
