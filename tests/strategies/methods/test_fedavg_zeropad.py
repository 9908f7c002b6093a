"""Zero-padded means against loops, with the scale in A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo
from fedlora.strategies.methods.fedavg_zeropad import FedAvgZeropad
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, start, train
from tests.naive.drawn import before, replies, updates_of
from tests.naive.fedavg_zeropad import Module

ZEROPAD = FedAvgZeropad()


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_equals_the_loop(parts: list[naive.Part], more: int) -> None:
    begun = before(parts, more)
    twin = Module(begun.lora["m"].A, begun.lora["m"].B, begun.lora["m"].scaling)
    twin.aggregate(parts)
    got = ZEROPAD.aggregate(ZEROPAD.init(begun), updates_of(parts), 1).adapter.lora["m"]
    assert got.scaling == begun.lora["m"].scaling
    torch.testing.assert_close(got.scaling * got.A, twin.A)
    torch.testing.assert_close(got.B, twin.B)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_fault_1_a_rank_1_client_is_filled_up_with_zeros_and_never_broadcast(order: tuple[int, int]) -> None:
    """Its one row of A counts in row 0 alone, in either order of arrival."""
    small = naive.Part(torch.full((1, 3), 8.0), torch.full((2, 1), 8.0), 1.0, 3)
    large = naive.Part(torch.ones(4, 3), torch.ones(2, 4), 1.0, 1)
    both = updates_of([small, large])
    got = ZEROPAD.aggregate(ZEROPAD.init(before([large], scaling=1.0)), [both[i] for i in order], 1).adapter.lora["m"]
    rows = torch.tensor([6.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(got.A.float(), rows[:, None].expand(4, 3))
    torch.testing.assert_close(got.B.float(), rows.expand(2, 4))


def test_fault_2_scalings_are_averaged_into_a_and_divided_out_once_when_sending() -> None:
    """alpha = 16 at ranks 4, 2, 1: scales 4, 8, 16."""
    clients = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=i + 1) for i, r in enumerate((4, 2, 1))]
    state = ZEROPAD.init(start(clients))
    updates = [train(ZEROPAD.broadcast(state, c, 1), c, seed=1) for c in clients]
    state = ZEROPAD.aggregate(state, updates, 1)
    for c in clients:
        for name, f in ZEROPAD.broadcast(state, c, 2).adapter.lora.items():
            assert f.scaling == 16 / c.rank
            first = sum(
                p * u.adapter.lora[name].scaling * u.adapter.lora[name].A[0]
                for p, u in zip((1 / 6, 2 / 6, 3 / 6), updates, strict=True)
            )
            torch.testing.assert_close(f.scaling * f.A[0], first)


def test_a_row_that_all_but_one_lack_shrinks_by_its_share_in_both_factors() -> None:
    """What rank-wise averaging repairs: the product of such a row keeps a quarter of itself at a share of a half."""
    parts = [naive.Part(torch.eye(2), torch.eye(2), 1.0, 1), naive.Part(torch.eye(2)[:1], torch.eye(2)[:, :1], 1.0, 1)]
    got = ZEROPAD.aggregate(ZEROPAD.init(before(parts)), updates_of(parts), 1).adapter.lora["m"]
    torch.testing.assert_close(got.scaling * got.B @ got.A, torch.diag(torch.tensor([1.0, 0.25])))


def test_rows_that_no_sampled_client_has_stay_alive() -> None:
    clients = [ClientInfo(client_id=i, rank=r, alpha=16) for i, r in enumerate((4, 2, 1))]
    begun = start(clients)
    state = ZEROPAD.init(begun)
    new = ZEROPAD.aggregate(state, [train(ZEROPAD.broadcast(state, c, 1), c, seed=1) for c in clients[1:]], 1)
    for name in SHAPES:
        assert torch.equal(new.adapter.lora[name].A[2:], begun.lora[name].A[2:])
        assert not new.adapter.lora[name].B[:, 2:].any()


def test_another_base_models_shapes_are_refused() -> None:
    parts = [
        naive.Part(torch.ones(2, 3), torch.ones(4, 2), 1.0, 1),
        naive.Part(torch.ones(1, 5), torch.ones(4, 1), 1.0, 1),
    ]
    with pytest.raises(StrategyError, match=r"m: clients sent factors of shapes \[2, 3\] and \[1, 5\]"):
        ZEROPAD.aggregate(ZEROPAD.init(before(parts)), updates_of(parts), 1)
