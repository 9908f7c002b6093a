"""Rank-wise means against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState
from fedlora.exchange import ClientInfo
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.rblora import RbLora
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, start, train
from tests.naive.drawn import before, factors_of, replies, updates_of
from tests.naive.rblora import Module

RBLORA = RbLora()


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_equals_the_loop_over_two_rounds(parts: list[naive.Part], more: int) -> None:
    """The second round starts from factors with B != 0, which rows that nobody has must keep."""
    begun = before(parts, more)
    rank = begun.lora["m"].rank
    full = naive.Part(parts[0].A[:1].expand(rank, -1), parts[0].B[:, :1].expand(-1, rank), 3.0, 2)
    twin = Module(begun.lora["m"].A, begun.lora["m"].B, begun.lora["m"].scaling)
    state = RBLORA.init(begun)
    for round, sent in enumerate(([full], parts), start=1):
        twin.aggregate(sent)
        state = RBLORA.aggregate(state, updates_of(sent), round)
    got = state.adapter.lora["m"]
    torch.testing.assert_close(got.scaling * got.A, twin.A)
    torch.testing.assert_close(got.B, twin.B)
    assert bool(got.B.any(dim=0).all())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_fault_1_a_rank_1_client_counts_in_its_own_row_alone(order: tuple[int, int]) -> None:
    small = naive.Part(torch.full((1, 3), 8.0), torch.full((2, 1), 8.0), 1.0, 3)
    large = naive.Part(torch.ones(4, 3), torch.ones(2, 4), 1.0, 1)
    both = updates_of([small, large])
    got = RBLORA.aggregate(RBLORA.init(before([large], scaling=1.0)), [both[i] for i in order], 1).adapter.lora["m"]
    rows = torch.tensor([6.25, 1.0, 1.0, 1.0])
    torch.testing.assert_close(got.A.float(), rows[:, None].expand(4, 3))
    torch.testing.assert_close(got.B.float(), rows.expand(2, 4))


def test_fault_2_scalings_are_averaged_into_a_and_divided_out_once_when_sending() -> None:
    """alpha = 16 at ranks 4, 2, 1: scales 4, 8, 16; rows 2 and 3 are the first client's alone."""
    clients = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=i + 1) for i, r in enumerate((4, 2, 1))]
    state = RBLORA.init(start(clients))
    updates = [train(RBLORA.broadcast(state, c, 1), c, seed=1) for c in clients]
    state = RBLORA.aggregate(state, updates, 1)
    for c in clients:
        for name, f in RBLORA.broadcast(state, c, 2).adapter.lora.items():
            sent = [u.adapter.lora[name] for u in updates]
            first = sum(p * g.scaling * g.A[0] for p, g in zip((1 / 6, 2 / 6, 3 / 6), sent, strict=True))
            torch.testing.assert_close(f.scaling * f.A[0], first)
            torch.testing.assert_close(f.scaling * f.A[2:], sent[0].scaling * sent[0].A[2 : c.rank])


@settings(max_examples=20, deadline=None)
@given(parts=replies())
def test_with_one_rank_and_scaling_it_is_fedavg(parts: list[naive.Part]) -> None:
    least = min(part.A.shape[0] for part in parts)
    cut = [naive.Part(p.A[:least], p.B[:, :least], 2.0, p.examples) for p in parts]
    begun = AdapterState(lora={"m": factors_of(cut[0])})
    left, right = (s.aggregate(s.init(begun), updates_of(cut), 1).adapter.lora["m"] for s in (RBLORA, FedAvg()))
    torch.testing.assert_close(left.A, right.A)
    torch.testing.assert_close(left.B, right.B)


def test_rows_that_no_sampled_client_has_keep_both_factors() -> None:
    clients = [ClientInfo(client_id=i, rank=r, alpha=16) for i, r in enumerate((4, 2, 1))]
    state = RBLORA.init(start(clients))
    state = RBLORA.aggregate(state, [train(RBLORA.broadcast(state, c, 1), c, seed=1) for c in clients], 1)
    new = RBLORA.aggregate(state, [train(RBLORA.broadcast(state, c, 2), c, seed=2) for c in clients[1:]], 2)
    for name in SHAPES:
        held, got = state.adapter.lora[name], new.adapter.lora[name]
        assert torch.equal(got.A[2:], held.A[2:])
        assert torch.equal(got.B[:, 2:], held.B[:, 2:])
        assert held.B[:, 2:].any()
        assert not torch.allclose(got.A[:2], held.A[:2])
