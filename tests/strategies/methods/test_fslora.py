"""FSLoRA: what is drawn, and that changes come back to the rows that they belong to."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.methods.fslora import drawn
from tests.naive.clients import SHAPES, Run, dense_deltas, start, train
from tests.naive.fslora import Module, Sketched, sketch

RANKS = (4, 2, 1, 3)


def clients_of(ranks: tuple[int, ...], alpha: float | str) -> list[ClientInfo]:
    return [ClientInfo(client_id=i, rank=r, alpha=alpha, num_examples=i + 1) for i, r in enumerate(ranks)]


@pytest.mark.parametrize("alpha", ["2r", 8])
def test_what_a_client_is_sent_is_unbiased_over_draws(alpha: float | str) -> None:
    """Each set of rows leads to the sketch of that set, their mean is the server's update, and all come up alike."""
    strategy, clients = load("fslora"), clients_of((4, 2), alpha)
    state = strategy.init(start(clients))
    replies = [train(strategy.broadcast(state, c, 1), c, 1) for c in clients]
    state = strategy.aggregate(state, replies, 1)
    name, server = "layers.0.q", state.adapter.lora["layers.0.q"]
    found: dict[tuple[int, ...], torch.Tensor] = {}
    times: dict[tuple[int, ...], int] = {}
    for number in range(1, 1201):
        rows = tuple(drawn(state.seed, number, 1, name, (4, 2)))
        times[rows] = times.get(rows, 0) + 1
        if rows not in found:
            found[rows] = dense_deltas(strategy.broadcast(state, clients[1], number).adapter)[name]
    assert found.keys() == {*itertools.combinations(range(4), 2)}
    assert all(140 < count < 260 for count in times.values())
    twin = Module(server.A, server.B, server.scaling)
    for rows, update in found.items():
        torch.testing.assert_close(update, twin.sent(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([*found.values()]).mean(dim=0), twin.total(), rtol=1e-5, atol=1e-6)


def test_rows_are_drawn_by_seed_round_client_and_module() -> None:
    one = drawn(0, 1, 2, "m", (64, 32))
    assert one == drawn(0, 1, 2, "m", (64, 32)) == sorted({*one})
    others = [drawn(1, 1, 2, "m", (64, 32)), drawn(0, 2, 2, "m", (64, 32)), drawn(0, 1, 3, "m", (64, 32))]
    assert one not in [*others, drawn(0, 1, 2, "n", (64, 32))]


def test_at_full_rank_it_is_fedavg_to_the_bit() -> None:
    clients = clients_of((3, 3, 3), 8)
    states = []
    for name in ("fslora", "fedavg"):
        strategy = Run(load(name), seed=5)
        state = strategy.init(start(clients))
        for number in (1, 2):
            sent = [strategy.broadcast(state, client, number) for client in clients]
            assert all(message.steady for message in sent)
            replies = [train(message, c, number) for message, c in zip(sent, clients, strict=True)]
            state = strategy.aggregate(state, replies, number)
        states.append(state.adapter)
    for name in SHAPES:
        assert torch.equal(states[0].lora[name].A, states[1].lora[name].A)
        assert torch.equal(states[0].lora[name].B, states[1].lora[name].B)


@pytest.mark.parametrize("alpha", ["2r", 8, 3.0])
def test_rounds_match_a_dense_reference(alpha: float | str) -> None:
    """Clients that skip rounds; each step is one of gradient descent on |s B S A - target|^2 / 2, rows of S alone."""
    strategy, clients = Run(load("fslora"), seed=3), clients_of(RANKS, alpha)
    generator = torch.Generator().manual_seed(2)
    targets = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()} for _ in clients
    ]
    state = strategy.init(start(clients))
    twin = {n: Module(f.A, f.B, f.scaling) for n, f in state.adapter.lora.items()}
    for number, chosen in {1: (0, 1, 2), 2: (1, 2), 3: (0, 3), 4: (0, 1, 2, 3)}.items():
        updates, parts = list[ClientUpdate](), {n: list[Sketched]() for n in SHAPES}
        for j in chosen:
            sent = strategy.broadcast(state, clients[j], number)
            assert sent.steady is (RANKS[j] == 4)
            lora = dict[str, LoraFactors]()
            for n, f in sent.adapter.lora.items():
                A, B, target = f.A.double(), f.B.double(), targets[j][n]
                error = f.scaling * B @ A - target
                # the factor R/k stands in A here, so that equal steps of the whole A are steps of its own rate
                inside = twin[n].scaling * 4 / (f.rank * f.scaling)
                A, B = A - 0.02 * inside**2 * f.scaling * B.T @ error, B - 0.02 * f.scaling * error @ A.T
                lora[n] = LoraFactors(A=A.float(), B=B.float(), scaling=f.scaling)
                rows = drawn(3, number, j, n, (4, f.rank))
                own, S = twin[n], sketch(4, rows)
                error = own.sent(rows) - target
                new_a = own.A - 0.02 * own.scaling * S @ own.B.T @ error
                new_b = own.B - 0.02 * own.scaling * error @ own.A.T @ S
                parts[n].append(Sketched(new_a, new_b, rows, clients[j].num_examples))
            updates.append(ClientUpdate(j, AdapterState(lora=lora), clients[j].num_examples))
        state = strategy.aggregate(state, updates, number)
        for n, own in twin.items():
            own.aggregate(parts[n])
            torch.testing.assert_close(state.adapter.lora[n].A.double(), own.A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state.adapter.lora[n].B.double(), own.B, rtol=1e-4, atol=1e-5)


def test_rows_that_nobody_was_sent_keep_their_bits() -> None:
    strategy, clients = load("fslora"), clients_of((4, 1), "2r")
    state = strategy.init(start(clients))
    state = strategy.aggregate(state, [train(strategy.broadcast(state, clients[0], 1), clients[0], 1)], 1)
    new = strategy.aggregate(state, [train(strategy.broadcast(state, clients[1], 2), clients[1], 2)], 2)
    for name, held in state.adapter.lora.items():
        (row,) = drawn(0, 2, 1, name, (4, 1))
        kept = [i for i in range(4) if i != row]
        assert torch.equal(new.adapter.lora[name].A[kept], held.A[kept])
        assert torch.equal(new.adapter.lora[name].B[:, kept], held.B[:, kept])
        assert not torch.equal(new.adapter.lora[name].A[row], held.A[row])


def test_a_rank_above_the_servers_is_refused() -> None:
    strategy, client = load("fslora"), ClientInfo(client_id=0, rank=2)
    state = strategy.init(start([client]))
    with pytest.raises(StrategyError, match="client 0 has rank 3, the server holds rank 2"):
        strategy.broadcast(state, replace(client, rank=3), 1)
