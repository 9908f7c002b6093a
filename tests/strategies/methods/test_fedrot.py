"""FedRot-LoRA: what turning undoes, whose turn it is, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, relative_error
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState
from fedlora.strategies.methods.fedrot import FedRot
from tests.naive.clients import start, train
from tests.naive.factored import ideal

CLIENTS = [ClientInfo(client_id=i, rank=3, num_examples=i + 1) for i in range(3)]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated_copies(rank: int, d_out: int, d_in: int, count: int, seed: int) -> tuple[ServerState, list[ClientUpdate]]:
    """A server's factors, and replies with one update in factors that are turned and reflected against each other."""
    held = LoraFactors(A=drawn(rank, d_in, seed=seed), B=drawn(d_out, rank, seed=seed + 1), scaling=2.0)
    state = ServerState(AdapterState(lora={"m": held}))
    A, B = held.A + 0.3 * drawn(rank, d_in, seed=seed + 2), held.B + 0.3 * drawn(d_out, rank, seed=seed + 3)
    replies = []
    for k in range(count):
        turn = torch.linalg.qr(drawn(rank, rank, seed=seed + 10 + k)).Q
        factors = LoraFactors(A=turn.T @ A, B=B @ turn, scaling=2.0)
        replies.append(ClientUpdate(k, AdapterState(lora={"m": factors}), num_examples=k + 1))
    return state, replies


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 5),
    d_out=st.integers(5, 9),
    d_in=st.integers(5, 9),
    number=st.integers(2, 5),
    seed=st.integers(0, 9999),
)
def test_rotated_copies_of_one_update_average_to_it(rank: int, d_out: int, d_in: int, number: int, seed: int) -> None:
    """Whichever factor is the reference. The plain means of the same replies are far off."""
    state, replies = rotated_copies(rank, d_out, d_in, count=4, seed=seed)
    got = FedRot().aggregate(state, replies, number).adapter.lora
    assert relative_error(got, ideal(replies[:1])) < 1e-8


def test_plain_means_of_rotated_copies_are_far_off() -> None:
    """What is tested above is not already true of fedavg, nor of round 1."""
    state, replies = rotated_copies(4, 9, 8, count=4, seed=3)
    for strategy, number in ((load("fedavg"), 2), (FedRot(), 1)):
        assert relative_error(strategy.aggregate(state, replies, number).adapter.lora, ideal(replies[:1])) > 0.3


@pytest.mark.parametrize(("number", "factor"), [(2, "A"), (3, "B"), (4, "A"), (5, "B")])
def test_a_and_b_take_turns_as_the_reference(number: int, factor: str) -> None:
    """A reply whose other factor is far from the server's, and this one a turned copy, comes back unturned."""
    held = LoraFactors(A=drawn(3, 8, seed=1), B=drawn(7, 3, seed=2), scaling=1.0)
    turn = torch.linalg.qr(drawn(3, 3, seed=3)).Q
    own = LoraFactors(
        A=turn.T @ held.A if factor == "A" else drawn(3, 8, seed=4),
        B=held.B @ turn if factor == "B" else drawn(7, 3, seed=5),
        scaling=1.0,
    )
    state = ServerState(AdapterState(lora={"m": held}))
    reply = ClientUpdate(0, AdapterState(lora={"m": own}), num_examples=1)
    got = FedRot().aggregate(state, [reply], number).adapter.lora["m"]
    torch.testing.assert_close(getattr(got, factor), getattr(held, factor))
    torch.testing.assert_close(got.B @ got.A, own.B @ own.A)


def test_a_reference_of_zeros_turns_nothing() -> None:
    """B = 0 after a restart says nothing about the columns of B: the result is that of fedavg."""
    state = FedRot().init(start(CLIENTS))
    updates = [train(FedRot().broadcast(state, client, 3), client, 3) for client in CLIENTS]
    got, plain = (s.aggregate(state, updates, 3).adapter.lora for s in (FedRot(), load("fedavg")))
    for name, factors in got.items():
        torch.testing.assert_close(factors.A, plain[name].A)
        torch.testing.assert_close(factors.B, plain[name].B)


def test_replies_that_did_not_move_leave_the_server_as_it_is() -> None:
    state = FedRot().init(start(CLIENTS))
    for number in (1, 2, 3):
        updates = [train(FedRot().broadcast(state, client, number), client, number) for client in CLIENTS]
        state = FedRot().aggregate(state, updates, number)
    echoes = [ClientUpdate(c.client_id, FedRot().broadcast(state, c, 4).adapter, num_examples=1) for c in CLIENTS]
    for number in (4, 5):
        for name, factors in FedRot().aggregate(state, echoes, number).adapter.lora.items():
            torch.testing.assert_close(factors.A, state.adapter.lora[name].A)
            torch.testing.assert_close(factors.B, state.adapter.lora[name].B)


def test_other_ranks_are_refused_by_name() -> None:
    odd = [*CLIENTS, ClientInfo(client_id=9, rank=1)]
    with pytest.raises(StrategyError, match="fedrot averages factors and needs one rank, got ranks 3, 3, 3, 1"):
        FedRot().check(odd)
    state = FedRot().init(start(CLIENTS))
    reply = train(FedRot().broadcast(state, CLIENTS[0], 2), CLIENTS[0], 2)
    small = {n: LoraFactors(f.A[:1], f.B[:, :1], f.scaling) for n, f in reply.adapter.lora.items()}
    with pytest.raises(StrategyError, match="client 0 sent rank 1, but fedrot on the server needs rank 3"):
        FedRot().aggregate(state, [replace(reply, adapter=AdapterState(lora=small))], 2)
