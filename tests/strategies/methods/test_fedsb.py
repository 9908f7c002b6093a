"""Fed-SB: the start against the dense mean gradient, and blocks of R."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.initializers.registry import INITIALIZERS
from tests.naive.clients import SHAPES, asked, begin, dense_deltas, start, started, train
from tests.naive.fedsb import Module


def server(strategy: Strategy, d_out: int, d_in: int, rank: int) -> ServerState:
    seeded = LoraFactors(A=torch.ones(rank, d_in), B=torch.zeros(d_out, rank), scaling=2.0)
    return strategy.init(AdapterState(lora={"m": seeded}))


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 7),
    sent=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 30)), min_size=1, max_size=3),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9999),
)
def test_it_starts_along_the_best_approximation_of_minus_the_mean_gradient(
    d_out: int, d_in: int, rank: int, sent: list[tuple[int, int]], size: float, seed: int
) -> None:
    strategy = load("fedsb")
    generator = torch.Generator().manual_seed(seed)
    replies = [
        ClientUpdate(
            client_id=i,
            adapter=AdapterState(
                lora={
                    "m": LoraFactors(
                        A=size * torch.randn(q, d_in, generator=generator),
                        B=torch.randn(d_out, q, generator=generator),
                        scaling=1.0,
                    )
                }
            ),
            num_examples=n,
        )
        for i, (q, n) in enumerate(sent)
    ]
    total = sum(n for _, n in sent)
    gradient = sum(r.num_examples / total * delta(r.adapter.lora["m"]).double() for r in replies)
    state = begin(strategy, server(strategy, d_out, d_in, rank), replies, first_step=1e-3)
    factors, core = state.adapter.lora["m"], state.adapter.lora["m"].R
    assert core is not None
    assert (factors.A.shape, factors.B.shape, core.shape) == ((rank, d_in), (d_out, rank), (rank, rank))

    full_a, full_b = min(rank, d_in), min(rank, d_out)  # whole bases, however few directions the gradient has
    torch.testing.assert_close(factors.A[:full_a] @ factors.A[:full_a].T, torch.eye(full_a), rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.B[:, :full_b].T @ factors.B[:, :full_b], torch.eye(full_b), rtol=0, atol=1e-5)
    assert torch.equal(core, torch.diag(core.diagonal()))

    u, s, vh = torch.linalg.svd(-gradient)
    keep = min(rank, len(s))
    best = (u[:, :keep] * s[:keep]) @ vh[:keep]
    first = dense_deltas(strategy.global_adapter(state))["m"]
    assert float(first.square().mean().sqrt()) == pytest.approx(1e-3, rel=1e-4)
    gap = float(s[keep - 1] - s[keep]) if keep < len(s) else float(s[0])
    if gap > 1e-3 * float(s[0]):  # else the best approximation is not one, but many
        torch.testing.assert_close(first / first.norm(), best / best.norm(), rtol=0, atol=1e-4)


def test_a_module_that_no_reply_of_round_0_had_is_trained_from_the_first_reply_that_has_it() -> None:
    strategy = load("fedsb")
    clients = [ClientInfo(client_id=i, rank=r) for i, r in enumerate((3, 2))]
    state = strategy.init(start(clients))
    *_, absent = state.adapter.lora
    replies = [train(asked(strategy, state, client), client, 0) for client in clients]
    some = [
        replace(r, adapter=replace(r.adapter, lora={n: f for n, f in r.adapter.lora.items() if n != absent}))
        for r in replies
    ]
    state = begin(strategy, state, some)
    assert not dense_deltas(strategy.global_adapter(state))[absent].any()
    replies = [train(strategy.broadcast(state, client, 1), client, 1) for client in clients]
    new = strategy.aggregate(state, replies, 1)
    expected = sum(
        r.num_examples * torch.nn.functional.pad(core, (0, 3 - len(core)) * 2)
        for r in replies
        for core in [r.adapter.lora[absent].R]
    ) / sum(r.num_examples for r in replies)
    torch.testing.assert_close(new.adapter.lora[absent].R, expected)
    assert dense_deltas(strategy.global_adapter(new))[absent].any()


def test_a_module_without_a_gradient_starts_at_zero_and_can_be_trained() -> None:
    strategy = load("fedsb")
    nothing = LoraFactors(A=torch.zeros(3, 5), B=torch.zeros(4, 3), scaling=1.0)
    reply = ClientUpdate(client_id=0, adapter=AdapterState(lora={"m": nothing}), num_examples=1)
    state = begin(strategy, server(strategy, 4, 5, 3), [reply])
    assert not state.adapter.lora["m"].R.any()
    torch.testing.assert_close(state.adapter.lora["m"].A @ state.adapter.lora["m"].A.T, torch.eye(3))
    torch.testing.assert_close(state.adapter.lora["m"].B.T @ state.adapter.lora["m"].B, torch.eye(3))


def test_round_0_asks_for_the_gradient_at_the_base_model() -> None:
    strategy = load("fedsb")
    clients = [ClientInfo(client_id=i, rank=rank, alpha=8) for i, rank in enumerate((4, 2))]
    state = strategy.init(start(clients))
    for client in clients:
        sent = asked(strategy, state, client)
        assert (sent.job, sent.plan.train, sent.plan.send) == ("gradient", frozenset(), {"A", "B"})
        assert not sent.steady
        for name, factors in sent.adapter.lora.items():
            assert factors.scaling == 1.0
            assert factors.A.shape == (client.rank, SHAPES[name][1])
            assert not factors.A.any()
            assert not factors.B.any()
        assert sent.adapter.tensors.keys() == {"head.weight"}


def test_each_client_trains_the_leading_block_of_one_r() -> None:
    strategy = load("fedsb")
    clients = [ClientInfo(client_id=i, rank=rank, alpha=8, num_examples=i + 1) for i, rank in enumerate((4, 2, 1))]
    state = strategy.init(start(clients))
    state = started(strategy, state, clients)
    for round in (1, 2):
        fixed = state.adapter.lora
        sent = [strategy.broadcast(state, client, round) for client in clients]
        for client, broadcast in zip(clients, sent, strict=True):
            assert (broadcast.job, broadcast.plan.train, broadcast.plan.send) == ("train", {"R"}, {"R"})
            assert broadcast.steady
            for name, f in broadcast.adapter.lora.items():
                r = client.rank
                assert torch.equal(f.R, fixed[name].R[:r, :r])
                torch.testing.assert_close(f.scaling * f.B @ f.A, fixed[name].B[:, :r] @ fixed[name].A[:r])
        replies = [train(b, c, round) for b, c in zip(sent, clients, strict=True)]
        state = strategy.aggregate(state, replies, round)
        for name in SHAPES:
            expected = torch.zeros(4, 4).double()
            for reply, share in zip(replies, (1 / 6, 2 / 6, 3 / 6), strict=True):
                core = reply.adapter.lora[name].R.double()  # pyright: ignore[reportOptionalMemberAccess]
                expected[: len(core), : len(core)] += share * core
            torch.testing.assert_close(state.adapter.lora[name].R.double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(state.adapter.lora[name].A, fixed[name].A)
            assert torch.equal(state.adapter.lora[name].B, fixed[name].B)
    learned = strategy.global_adapter(state)
    assert learned.tensors.keys() == {"head.weight"}
    for name, factors in learned.lora.items():
        torch.testing.assert_close(factors.A, state.adapter.lora[name].R @ state.adapter.lora[name].A)
        assert factors.scaling == 1.0


def test_a_first_step_of_zero_starts_at_the_base_model() -> None:
    strategy, client = load("fedsb"), ClientInfo(client_id=0, rank=2)
    state = strategy.init(start([client]))
    state = begin(strategy, state, [train(asked(strategy, state, client), client, 0)], first_step=0.0)
    assert not any(delta.any() for delta in dense_deltas(strategy.global_adapter(state)).values())
    assert all(f.B.any() for f in state.adapter.lora.values())


@pytest.mark.parametrize("size", [-1.0, float("inf"), float("nan")])
def test_a_first_step_that_is_no_size_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match=r"lora-sb's first_step = .*, expected a number of at least 0"):
        INITIALIZERS.load("lora-sb", first_step=size)


def test_rounds_match_a_dense_reference() -> None:
    """Partial participation, a late client, unequal ranks; R trained by gradient steps towards each client's target."""
    strategy = load("fedsb")
    clients = [ClientInfo(client_id=i, rank=r, num_examples=3 * i + 1) for i, r in enumerate((3, 2, 1, 3))]
    shapes = {"a": (6, 9), "b": (7, 5)}
    generator = torch.Generator().manual_seed(4)
    targets = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in clients
    ]
    state = strategy.init(start(clients, 3, shapes))
    replies: list[ClientUpdate] = []
    for client, target in zip(clients, targets, strict=True):
        lora = {}
        for n, matrix in target.items():  # the gradient at the base model, of |dW - target|^2 / 2, at the client's rank
            u, s, vh = torch.linalg.svd(-matrix)
            r = client.rank
            lora[n] = LoraFactors(A=vh[:r].float(), B=(u[:, :r] * s[:r]).float(), scaling=1.0)
        replies.append(
            ClientUpdate(client_id=client.client_id, adapter=AdapterState(lora=lora), num_examples=client.num_examples)
        )
    state = begin(strategy, state, replies, first_step=1e-2)
    examples = [client.num_examples for client in clients]
    twin = {n: Module([delta(r.adapter.lora[n]) for r in replies], examples, 3, 1e-2) for n in shapes}
    for round, chosen in {1: (0, 1, 2), 2: (0, 2), 3: (0, 1), 4: (0, 1, 2, 3), 5: (1, 3)}.items():
        updates: list[ClientUpdate] = []
        cores: dict[str, list[torch.Tensor]] = {n: [] for n in shapes}
        for j in chosen:
            sent = strategy.broadcast(state, clients[j], round).adapter
            lora = {}
            for n, f in sent.lora.items():
                A, B, R, target = f.A.double(), f.B.double(), f.R.double(), targets[j][n]
                stepped = (R - 0.1 * f.scaling * B.T @ (f.scaling * B @ R @ A - target) @ A.T).float()
                lora[n] = LoraFactors(torch.empty(0, 0), torch.empty(0, 0), f.scaling, stepped)
                r, mine = clients[j].rank, twin[n].send(clients[j].rank)
                error = twin[n].B[:, :r] @ mine @ twin[n].A[:r] - target
                cores[n].append(mine - 0.1 * twin[n].B[:, :r].T @ error @ twin[n].A[:r].T)
            adapter = AdapterState(lora=lora, tensors=sent.tensors)
            updates.append(ClientUpdate(client_id=j, adapter=adapter, num_examples=clients[j].num_examples))
        state = strategy.aggregate(state, updates, round)
        learned = dense_deltas(strategy.global_adapter(state))
        for n in shapes:
            twin[n].aggregate(cores[n], [clients[j].num_examples for j in chosen])
            torch.testing.assert_close(learned[n], twin[n].total(), rtol=1e-4, atol=1e-5)
