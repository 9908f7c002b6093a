"""FedSA-LoRA: the mean of each row of A, and no B on the server."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from tests.naive.clients import SHAPES, dense_deltas, start, train
from tests.naive.dense import Part
from tests.naive.fedsa import Module


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rslora=st.booleans(), alpha=st.sampled_from(["2r", 16]), seed=st.integers(0, 999))
def test_each_row_is_the_mean_over_the_clients_that_have_it(
    data: st.DataObject, rslora: bool, alpha: str | int, seed: int
) -> None:
    strategy = load("fedsa")
    clients = [
        ClientInfo(client_id=i, rank=rank, alpha=alpha, num_examples=data.draw(st.integers(1, 30)), rslora=rslora)
        for i, rank in enumerate(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    ]
    state = strategy.init(start(clients, seed))
    for round in (1, 2):
        chosen = data.draw(st.lists(st.sampled_from(clients), min_size=1, unique_by=lambda c: c.client_id))
        replies = [train(strategy.broadcast(state, client, round), client, seed + round) for client in chosen]
        before, state = state, strategy.aggregate(state, replies, round)
        for name in SHAPES:
            old, new = before.adapter.lora[name], state.adapter.lora[name]
            for row in range(old.rank):
                have = [(r.adapter.lora[name], r.num_examples) for r in replies if r.adapter.lora[name].rank > row]
                expected = old.scaling * old.A[row].double()
                if have:
                    total = sum(n for _, n in have)
                    expected = sum(n / total * f.scaling * f.A[row].double() for f, n in have)
                torch.testing.assert_close(new.scaling * new.A[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_b_never_reaches_the_server() -> None:
    strategy, client = load("fedsa"), ClientInfo(client_id=0, rank=3)
    state = strategy.init(start([client]))
    for round in (1, 2):
        sent = strategy.broadcast(state, client, round)
        assert (sent.plan.train, sent.plan.send, sent.plan.keep) == ({"A", "B"}, {"A"}, {"B"})
        reply = train(sent, client, round)
        assert not any(f.B.numel() for f in reply.adapter.lora.values())
        state = strategy.aggregate(state, [reply], round)
        learned = strategy.global_adapter(state)
        assert not any(delta.any() for delta in dense_deltas(learned).values())
        for name, factors in learned.lora.items():
            assert factors.A.shape == (3, SHAPES[name][1])
            torch.testing.assert_close(factors.A, 2 * state.adapter.lora[name].A)  # alpha = 2r, at scaling 1


def test_rounds_match_a_dense_reference() -> None:
    """Partial participation, a late client, unequal ranks and scalings; every client's own model is tracked densely."""
    strategy = load("fedsa")
    clients = [
        ClientInfo(client_id=i, rank=r, alpha=4.0 if i % 2 else "r", num_examples=3 * i + 1)
        for i, r in enumerate((4, 2, 1, 4))
    ]
    generator = torch.Generator().manual_seed(2)
    targets = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()} for _ in clients
    ]
    begun = start(clients, 3)
    state = strategy.init(begun)
    twin = {n: Module(f.A, f.B, f.scaling) for n, f in begun.lora.items()}
    own: dict[tuple[int, str], torch.Tensor] = {}

    def step(
        A: torch.Tensor, B: torch.Tensor, scaling: float, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = A.double(), B.double()
        error = scaling * (B @ A) - target
        return A - 0.05 * scaling * (B.T @ error), B - 0.05 * scaling * (error @ A.T)

    for round, chosen in {1: (0, 1, 2), 2: (0, 2), 3: (0, 1), 4: (0, 1, 2, 3), 5: (0, 3)}.items():
        updates: list[ClientUpdate] = []
        parts: dict[str, list[Part]] = {n: [] for n in SHAPES}
        dense_b: dict[str, dict[int, torch.Tensor]] = {n: {} for n in SHAPES}
        for j in chosen:
            client, lora = clients[j], {}
            for n, f in strategy.broadcast(state, client, round).adapter.lora.items():
                A, own[j, n] = step(f.A, own.get((j, n), f.B), f.scaling, targets[j][n])
                lora[n] = LoraFactors(A.float(), torch.empty(0, 0), f.scaling)
                mine = twin[n].send(j, client.rank_of(n), client.scaling_of(n))
                dense_a, dense_b[n][j] = step(*mine, client.scaling_of(n), targets[j][n])
                parts[n].append(Part(dense_a, dense_b[n][j], client.scaling_of(n), client.num_examples))
            updates.append(ClientUpdate(client_id=j, adapter=AdapterState(lora=lora), num_examples=client.num_examples))
        state = strategy.aggregate(state, updates, round)
        for n in SHAPES:
            twin[n].aggregate(parts[n], dense_b[n])
        for client in clients:
            for n, f in strategy.broadcast(state, client, round + 1).adapter.lora.items():
                A, B = twin[n].send(client.client_id, client.rank_of(n), client.scaling_of(n))
                mine = own.setdefault((client.client_id, n), f.B).double() @ f.A.double()
                torch.testing.assert_close(f.scaling * mine, f.scaling * B @ A, rtol=1e-4, atol=1e-5)
