"""FedSA-LoRA: the mean of each row of A, and no B on the server."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from tests.naive.clients import SHAPES, dense_deltas, start, train


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
        assert (sent.trainable, sent.upload, sent.personal) == ({"A", "B"}, {"A"}, {"B"})
        reply = train(sent, client, round)
        assert not any(f.B.numel() for f in reply.adapter.lora.values())
        state = strategy.aggregate(state, [reply], round)
        learned = strategy.global_adapter(state)
        assert not any(delta.any() for delta in dense_deltas(learned).values())
        for name, factors in learned.lora.items():
            assert factors.A.shape == (3, SHAPES[name][1])
            torch.testing.assert_close(factors.A, 2 * state.adapter.lora[name].A)  # alpha = 2r, at scaling 1
