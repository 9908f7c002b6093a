"""FFA-LoRA, and what it shares with RoLoRA, FedSVD and Fed-SB: a mean is exact where the rest is common to all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy, whole_adapter
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, dense_deltas, start, started, train, whole

EXACT = [load("ffa"), load("rolora"), load("fedsvd"), load("fedsvd", period=3), load("fedsb")]
exact = pytest.mark.parametrize("strategy", EXACT, ids=str)


@st.composite
def federations(draw: st.DrawFn) -> list[ClientInfo]:
    """Clients of any ranks (above min(d), too), scalings and weights; each with its own alpha."""
    rslora = draw(st.booleans())
    return [
        ClientInfo(
            client_id=i,
            rank=draw(st.integers(1, 10)),
            alpha=draw(st.sampled_from(["2r", "r", 16, 3.0])),
            num_examples=draw(st.integers(1, 40)),
            rslora=rslora,
        )
        for i in range(draw(st.integers(1, 4)))
    ]


def begun(strategy: Strategy, clients: Sequence[ClientInfo], seed: int) -> ServerState:
    return started(strategy, strategy.init(start(clients, seed)), clients, seed)


def dense_mean(ended: Sequence[AdapterState], replies: Sequence[ClientUpdate]) -> dict[str, torch.Tensor]:
    """sum_k p_k s_k B_k R_k A_k by module, from what each client ended with."""
    parts: dict[str, list[naive.Part]] = {name: [] for name in sorted(SHAPES)}
    for adapter, reply in zip(ended, replies, strict=True):
        for name, f in adapter.lora.items():
            core = (torch.eye(f.rank) if f.R is None else f.R).double()
            parts[name].append(naive.Part(core @ f.A.double(), f.B.double(), f.scaling, reply.num_examples))
    return {name: naive.ideal(of_module) for name, of_module in parts.items()}


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    for name, matrix in expected.items():
        assert float((got[name] - matrix).norm()) <= tolerance * (1 + float(matrix.norm())), name


@exact
@settings(max_examples=20, deadline=None)
@given(clients=federations(), data=st.data(), seed=st.integers(0, 999))
def test_every_round_gives_the_mean_of_the_updates(
    strategy: Strategy, clients: list[ClientInfo], data: st.DataObject, seed: int
) -> None:
    """Also when the largest clients stay away; and what the server completes is what the clients ended with."""
    state = begun(strategy, clients, seed)
    for round in range(1, 5):
        chosen = data.draw(st.lists(st.sampled_from(clients), min_size=1, unique_by=lambda c: c.client_id))
        sent = [strategy.broadcast(state, client, round) for client in chosen]
        replies = [train(b, c, seed + round) for b, c in zip(sent, chosen, strict=True)]
        ideal = dense_mean([whole(b, reply) for b, reply in zip(sent, replies, strict=True)], replies)
        assert_near(dense_mean([whole_adapter(reply, state) for reply in replies], replies), ideal)
        state = strategy.aggregate(state, replies, round)
        assert_near(dense_deltas(strategy.global_adapter(state)), ideal)


@exact
def test_only_what_is_trained_is_sent(strategy: Strategy) -> None:
    client = ClientInfo(client_id=0, rank=3)
    state = begun(strategy, [client], 0)
    for round in (1, 2):
        sent = strategy.broadcast(state, client, round)
        assert sent.plan.train == sent.plan.send
        assert len(sent.plan.train) == 1
        state = strategy.aggregate(state, [train(sent, client, round)], round)


def gradient_sizes(sent: Broadcast, seed: int) -> dict[str, float]:
    """The size of the trained factor's gradients on `<G, B R A>`, over a few random G, by module."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {}
    for name, f in sent.adapter.lora.items():
        leaves = {"A": f.A, "B": f.B, "R": torch.eye(f.rank) if f.R is None else f.R}
        leaves = {factor: tensor.clone().requires_grad_() for factor, tensor in leaves.items()}
        trained = [leaves[factor] for factor in sorted(sent.plan.train)]
        sizes[name] = 0.0
        for G in torch.randn(10, *SHAPES[name], generator=generator):
            value = (G * (leaves["B"] @ leaves["R"] @ leaves["A"])).sum()
            sizes[name] += sum(float(gradient.norm()) for gradient in torch.autograd.grad(value, trained))
    return sizes


@exact
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999))
def test_fault_9_what_a_round_trains_has_a_gradient(strategy: Strategy, data: st.DataObject, seed: int) -> None:
    """No round trains A while B = 0, and no row of the factors dies, whoever was sampled before."""
    clients = [ClientInfo(client_id=i, rank=rank, alpha=8) for i, rank in enumerate((2, 1, 2))]
    state = begun(strategy, clients, seed)
    for round in range(1, 6):
        everyone = [strategy.broadcast(state, client, round) for client in clients]
        for sent in everyone:
            assert min(gradient_sizes(sent, seed).values()) > 1e-3
            if "A" in sent.plan.train:
                assert all(f.B.any() for f in sent.adapter.lora.values())
        chosen = data.draw(st.lists(st.sampled_from(clients), min_size=1, unique_by=lambda c: c.client_id))
        state = strategy.aggregate(state, [train(everyone[c.client_id], c, seed + round) for c in chosen], round)
        for factors in state.adapter.lora.values():
            assert (factors.A.any(dim=1) | factors.B.any(dim=0)).all()


def test_a_is_the_seeded_one_for_ever_and_cut_with_the_scale_in_it() -> None:
    strategy = load("ffa")
    clients = [ClientInfo(client_id=i, rank=rank, alpha=8) for i, rank in enumerate((4, 2, 1))]
    begin = start(clients, 3)
    state = strategy.init(begin)
    for round in (1, 2, 3):
        sent = [strategy.broadcast(state, client, round) for client in clients]
        for client, broadcast in zip(clients, sent, strict=True):
            for name, factors in broadcast.adapter.lora.items():
                first = begin.lora[name]
                expected = first.scaling * first.A[: client.rank] / client.scaling_of(name)
                torch.testing.assert_close(factors.A, expected, rtol=1e-6, atol=0)
        state = strategy.aggregate(state, [train(b, c, round) for b, c in zip(sent, clients, strict=True)], round)
        assert all(torch.equal(state.adapter.lora[name].A, f.A) for name, f in begin.lora.items())
