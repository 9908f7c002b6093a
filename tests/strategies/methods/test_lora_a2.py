"""LoRA-A2: which rows a client trains, and that a round is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, count_numbers
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState
from fedlora.strategies.configured import configured
from fedlora.strategies.methods.lora_a2 import chosen
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from tests.naive.clients import SHAPES, HeldBase, dense_deltas, start, train
from tests.naive.lora_a2 import Server, Trained

RANKS = (4, 2, 1, 3)
EMPTY = torch.empty(0, 0)


def clients_of(ranks: tuple[int, ...], alpha: float | str = "2r") -> list[ClientInfo]:
    return [ClientInfo(client_id=i, rank=r, alpha=alpha, num_examples=i + 1) for i, r in enumerate(ranks)]


@pytest.mark.parametrize("alpha", ["2r", 8, 3.0])
def test_rounds_match_a_dense_reference(alpha: float | str) -> None:
    """Rows, factors and whole models over rounds in which clients come and go; a round adds the mean of whole models.

    A client's step is one of gradient descent on |W + s B A - target|^2 / 2, W being what is frozen beside it.
    """
    strategy, clients = load("lora-a2"), clients_of(RANKS, alpha)
    generator = torch.Generator().manual_seed(2)
    targets = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()} for _ in clients
    ]
    state = strategy.init(start(clients))
    held = state.adapter.lora
    twin = Server(
        {n: f.A for n, f in held.items()}, {n: f.B for n, f in held.items()}, {n: f.scaling for n, f in held.items()}
    )
    present = {1: (0, 1, 2), 2: (1, 2), 3: (0, 3), 4: (0, 1, 2, 3), 5: (1, 2, 3), 6: (1, 2), 7: (0, 1, 2, 3), 8: (1, 3)}
    for number, on in present.items():
        updates, parts = list[ClientUpdate](), list[Trained]()
        wholes: dict[str, Tensor] = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
        share = {j: clients[j].num_examples / sum(clients[i].num_examples for i in on) for j in on}
        for j in on:
            sent = strategy.broadcast(state, clients[j], number)
            rows = twin.select(j, dict.fromkeys(SHAPES, clients[j].rank), number)
            assert sent.steady is (RANKS[j] == 4)
            assert sent.plan.train == sent.plan.send == ({"B"} if number % 2 else {"A"})
            frozen = HeldBase()
            frozen.apply(replace(sent, folds_from=0))
            beside = dense_deltas(frozen.folds)
            lora = dict[str, LoraFactors]()
            own_a, own_b = ({n: t.clone() for n, t in whole.items()} for whole in (twin.A, twin.B))
            for n, f in sent.adapter.lora.items():
                assert rows[n] == chosen(state, number, j, n, f.rank)
                A, B, W = f.A.double(), f.B.double(), beside.get(n, torch.zeros(SHAPES[n], dtype=torch.float64))
                torch.testing.assert_close(W + f.scaling * B @ A, twin.total(n), rtol=1e-4, atol=1e-5)
                error = W + f.scaling * B @ A - targets[j][n]
                exact = twin.total(n) - targets[j][n]
                if number % 2:
                    B = B - 0.05 * f.scaling * error @ A.T
                    own_b[n][:, rows[n]] -= 0.05 * twin.scaling[n] * exact @ twin.A[n][rows[n]].T
                else:
                    A = A - 0.05 * f.scaling * B.T @ error
                    own_a[n][rows[n]] -= 0.05 * f.scaling**2 / twin.scaling[n] * twin.B[n][:, rows[n]].T @ exact
                wholes[n] += share[j] * (W + f.scaling * B @ A)
                lora[n] = LoraFactors(
                    A=EMPTY if number % 2 else A.float(), B=B.float() if number % 2 else EMPTY, scaling=f.scaling
                )
            parts.append(Trained(j, clients[j].num_examples, rows, own_a, own_b))
            updates.append(ClientUpdate(j, AdapterState(lora=lora), clients[j].num_examples))
        state = strategy.aggregate(state, updates, number)
        twin.aggregate(parts, number)
        learned = dense_deltas(strategy.global_adapter(state))
        for n in SHAPES:
            torch.testing.assert_close(state.adapter.lora[n].A.double(), twin.A[n], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state.adapter.lora[n].B.double(), twin.B[n], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(learned[n], wholes[n], rtol=1e-4, atol=1e-5)


def test_at_full_budget_it_is_rolora_to_the_bit() -> None:
    clients = clients_of((3, 3, 3), 8)
    states: list[ServerState] = []
    for name in ("lora-a2", "rolora"):
        strategy = load(name)
        state = strategy.init(start(clients))
        for number in (1, 2, 3, 4):
            sent = [strategy.broadcast(state, client, number) for client in clients]
            assert all(message.steady and not message.folds for message in sent)
            replies = [train(message, c, number) for message, c in zip(sent, clients, strict=True)]
            state = strategy.aggregate(state, replies, number)
        states.append(state)
    assert not states[0].memory
    for name in SHAPES:
        assert torch.equal(states[0].adapter.lora[name].A, states[1].adapter.lora[name].A)
        assert torch.equal(states[0].adapter.lora[name].B, states[1].adapter.lora[name].B)


def test_a_client_gets_no_more_than_its_ranks_and_a_row_of_each_module() -> None:
    strategy, clients = load("lora-a2"), clients_of(RANKS)
    state = strategy.init(start(clients))
    spread = set[int]()
    for number in range(1, 9):
        sent = [strategy.broadcast(state, client, number) for client in clients]
        for client, message in zip(clients, sent, strict=True):
            ranks = {n: f.rank for n, f in message.adapter.lora.items()}
            assert ranks.keys() == SHAPES.keys()
            assert sum(ranks.values()) <= client.rank * len(SHAPES)
            assert count_numbers(ranks, SHAPES) <= count_numbers(dict.fromkeys(SHAPES, client.rank), SHAPES)
            assert min(ranks.values()) >= 1
            for n, f in message.adapter.lora.items():
                assert f.scaling == client.scaling_of(n)
            spread |= {*ranks.values()} if client.rank == 2 else set()
        state = strategy.aggregate(state, [train(m, c, number) for m, c in zip(sent, clients, strict=True)], number)
    assert len(spread) > 1


def test_every_row_is_tried_and_then_those_that_moved_most() -> None:
    strategy, clients = load("lora-a2"), clients_of((4, 1))
    state = strategy.init(start(clients, shapes={"m": (6, 9)}))
    tried: list[int] = []
    for number in (1, 3, 5, 7):  # rounds of B alone, so that nothing else is learned of the rows
        (row,) = chosen(state, number, 1, "m", 1)
        tried.append(row)
        reply = train(strategy.broadcast(state, clients[1], number), clients[1], number)
        size = {0: 1.0, 1: 9.0, 2: 3.0, 3: 2.0}[row]
        held = state.adapter.lora["m"]
        B = held.B[:, [row]] + size * torch.ones(6, 1) / float(held.A[row].norm())
        lora = {"m": replace(reply.adapter.lora["m"], B=B)}
        state = strategy.aggregate(state, [replace(reply, adapter=replace(reply.adapter, lora=lora))], number)
    assert tried == [0, 1, 2, 3]
    assert chosen(state, 9, 1, "m", 1) == [1]
    assert chosen(state, 9, 1, "m", 2) == [1, 2]
    assert chosen(state, 9, 0, "m", 2) == [0, 1]


def test_rows_that_nobody_trained_keep_their_bits() -> None:
    strategy, clients = load("lora-a2"), clients_of((4, 1))
    state = strategy.init(start(clients))
    for number in (1, 2):
        state = strategy.aggregate(state, [train(strategy.broadcast(state, c, number), c, 1) for c in clients], number)
    for number in (3, 4):
        sent = strategy.broadcast(state, clients[1], number)
        new = strategy.aggregate(state, [train(sent, clients[1], number)], number)
        for name, held in state.adapter.lora.items():
            rows = chosen(state, number, 1, name, sent.adapter.lora[name].rank)
            kept = [row for row in range(4) if row not in rows]
            assert torch.equal(new.adapter.lora[name].A[kept], held.A[kept])
            assert torch.equal(new.adapter.lora[name].B[:, kept], held.B[:, kept])


@pytest.mark.parametrize("name", ["fslora", "lora-a2", "fed-plora"])
def test_krum_is_refused_where_clients_hold_other_rows(name: str) -> None:
    robust = Robust(load(name), rule="krum", byzantine=0)
    robust.check(clients_of((2, 2, 2)))
    Robust(load(name)).check(clients_of((4, 2, 1)))
    with pytest.raises(StrategyError, match=r"krum compares whole updates, .* has each client train other rows"):
        robust.check(clients_of((4, 2, 1)))


@pytest.mark.parametrize("every", [1, 2])
def test_restarts_are_refused(every: int) -> None:
    clients = clients_of((4, 2))
    with pytest.raises(StrategyError, match=r"strategy\.restart-every"):
        Restart(load("lora-a2"), every=every).check(clients)


def test_merged_folds_are_refused() -> None:
    keys = {"strategy.name": "lora-a2", "anchor.base-update": "merge", "model.quantization": "none"}
    with pytest.raises(StrategyError, match=r"anchor\.base-update = merge: strategy\.name = lora-a2"):
        configured(parse(keys))
