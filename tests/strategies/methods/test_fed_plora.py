"""Fed-PLoRA: whole models on every client, whose turn it is, and what is averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlora.common.errors import StrategyError
from fedlora.config import Scalar, parse
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.base import ServerState
from fedlora.strategies.configured import configured
from fedlora.strategies.methods.fed_plora import FedPLora, turn_of
from fedlora.strategies.wrappers.restart import Restart
from tests.naive.clients import SHAPES, HeldBase, Run, dense_deltas, start, train

CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


def after(rounds: int, strategy: FedPLora | Run | None = None, clients: list[ClientInfo] | None = None) -> ServerState:
    played, everyone = strategy or FedPLora(), clients or CLIENTS
    state = played.init(start(everyone))
    for number in range(1, rounds + 1):
        updates = [train(played.broadcast(state, client, number), client, number) for client in everyone]
        state = played.aggregate(state, updates, number)
    return state


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_every_client_starts_from_the_servers_whole_model(rounds: int) -> None:
    """Its base model's anchor and its own terms are the global update, at each client's own scaling."""
    state = after(rounds)
    whole = dense_deltas(FedPLora().global_adapter(state))
    for client in CLIENTS:
        sent, held = FedPLora().broadcast(state, client, rounds + 1), HeldBase()
        held.apply(sent)
        own, frozen = dense_deltas(sent.adapter), dense_deltas(held.folds)
        for name, model in whole.items():
            assert sent.adapter.lora[name].rank == client.rank
            torch.testing.assert_close(own[name] + frozen.get(name, 0.0), model, rtol=1e-4, atol=1e-5)


def test_equal_ranks_are_fedavg() -> None:
    equal = [replace(client, rank=3) for client in CLIENTS]
    mine = theirs = start(equal)
    state, plain = FedPLora().init(mine), load("fedavg").init(theirs)
    for number in (1, 2, 3):
        updates = []
        for client in equal:
            sent, other = FedPLora().broadcast(state, client, number), load("fedavg").broadcast(plain, client, number)
            assert not sent.folds
            turn = turn_of(3, 0, number)
            for name, factors in other.adapter.lora.items():
                torch.testing.assert_close(sent.adapter.lora[name].A, factors.A[turn])
            updates.append((train(sent, client, number), turn))
        back = sorted(range(3), key=updates[0][1].__getitem__)
        turned = [
            replace(
                u,
                adapter=replace(
                    u.adapter,
                    lora={n: replace(f, A=f.A[back], B=f.B[:, back]) for n, f in u.adapter.lora.items()},
                ),
            )
            for u, _ in updates
        ]
        state = FedPLora().aggregate(state, [u for u, _ in updates], number)
        plain = load("fedavg").aggregate(plain, turned, number)
        for name, factors in plain.adapter.lora.items():
            torch.testing.assert_close(state.adapter.lora[name].A, factors.A)
            torch.testing.assert_close(state.adapter.lora[name].B, factors.B)


def test_terms_that_nobody_trained_keep_their_value_and_all_have_their_turn() -> None:
    """The client of rank 1 is alone: one term moves in each round, and in time each of them."""
    state, moved = after(1), set[int]()
    for number in range(2, 22):
        sent = FedPLora().broadcast(state, CLIENTS[2], number)
        new = FedPLora().aggregate(state, [train(sent, CLIENTS[2], number)], number)
        (mine, *others) = turn_of(4, 0, number)
        for name in SHAPES:
            old, now = state.adapter.lora[name], new.adapter.lora[name]
            assert torch.equal(now.A[others], old.A[others])
            assert torch.equal(now.B[:, others], old.B[:, others])
            assert not torch.equal(now.B[:, mine], old.B[:, mine])
        state, moved = new, moved | {mine}
    assert moved == {0, 1, 2, 3}


def test_clients_of_one_rank_train_the_same_terms_and_hold_the_same_anchor() -> None:
    state = after(1)
    one, two = (FedPLora().broadcast(state, ClientInfo(i, 2, 16, known_base_version=i), 2) for i in (1, 2))
    assert one.base_version == two.base_version > 0
    for name, factors in one.folds[-1].lora.items():
        assert torch.equal(factors.A, two.folds[-1].lora[name].A)
        assert factors.rank == 2


def test_a_number_format_keeps_no_remainder_for_rows_that_change() -> None:
    """The strategy is steady, and so may have a server optimizer; what a client is sent is not."""
    assert FedPLora.steady
    assert not FedPLora().broadcast(after(1), CLIENTS[1], 2).steady


def test_what_does_not_fit_is_refused_by_name() -> None:
    keys: dict[str, Scalar] = {"strategy.name": "fed-plora", "model.quantization": "none"}
    with pytest.raises(StrategyError, match=r"fed-plora takes folds back .*; set anchor\.base-update = anchor$"):
        configured(parse({**keys, "anchor.base-update": "merge"}))
    with pytest.raises(StrategyError, match=r"FedPLora takes back folds of the round before, .*restart-every = 1, or"):
        Restart(FedPLora(), every=2)
