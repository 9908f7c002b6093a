"""ABMLL against products of Gaussians, one client after another, and on a grid of densities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate, Term
from fedlora.strategies.methods.abmll import Abmll
from fedlora.strategies.methods.fedavg import FedAvg
from tests.federation import run_locally, tiny
from tests.naive import dense as naive
from tests.naive.abmll import Module
from tests.naive.clients import start, train
from tests.naive.drawn import before, replies, updates_of
from tests.strategies.test_invariants import assert_same


@pytest.mark.parametrize("memory", [0.0, 0.6])
@settings(max_examples=30, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_equals_the_product_of_gaussians_over_three_rounds(memory: float, parts: list[naive.Part], more: int) -> None:
    begun = before(parts, more)
    rank = begun.lora["m"].rank
    full = naive.Part(parts[0].A[:1].expand(rank, -1), parts[0].B[:, :1].expand(-1, rank), 3.0, 2)
    strategy = Abmll(memory=memory)
    twin = Module(begun.lora["m"].A, begun.lora["m"].B, begun.lora["m"].scaling, memory)
    state = strategy.init(begun)
    for round, sent in enumerate(([full], parts, [full, *parts[1:]]), start=1):
        twin.aggregate(sent)
        state = strategy.aggregate(state, updates_of(sent), round)
        got = state.adapter.lora["m"]
        torch.testing.assert_close(got.scaling * got.A, twin.A)
        torch.testing.assert_close(got.B, twin.B)


def test_the_mean_is_that_of_the_posterior_on_a_grid() -> None:
    """One entry, two rounds: the densities of all replies and of the prior are multiplied on a grid of values."""
    strategy = Abmll(memory=0.5)

    def one(value: float) -> AdapterState:
        return AdapterState(lora={"m": LoraFactors(torch.tensor([[value]]), torch.ones(1, 1), 1.0)})

    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    state = strategy.init(one(0.3))
    prior, precision = torch.zeros_like(grid), 0.0
    for number, seen in enumerate(([(1.0, 3), (-2.0, 1)], [(2.0, 1), (0.5, 4)]), start=1):
        updates = [ClientUpdate(client, one(value), n) for client, (value, n) in enumerate(seen)]
        state = strategy.aggregate(state, updates, number)
        shares = [n / sum(n for _, n in seen) for _, n in seen]
        logs = prior + sum(-0.5 * p * (value - grid) ** 2 for (value, _), p in zip(seen, shares, strict=True))
        density = torch.softmax(logs, dim=0)
        mean = float((density * grid).sum())
        assert float(state.adapter.lora["m"].A) == pytest.approx(mean, abs=1e-4)
        precision = 0.5 * precision + 1.0
        assert float(state.memory["abmll.precision"].tensors["m"]) == pytest.approx(precision)
        # the posterior, with half of its precision, is the next prior
        prior = 0.5 * -0.5 * precision * (grid - float(state.adapter.lora["m"].A)) ** 2


def test_without_memory_and_at_one_rank_it_is_fedavg_to_the_bit() -> None:
    clients = [ClientInfo(client_id=i, rank=3, num_examples=2 * i + 1) for i in range(3)]
    states = [strategy.init(start(clients)) for strategy in (Abmll(), FedAvg())]
    for number in (1, 2):
        updates = [train(FedAvg().broadcast(states[1], client, number), client, number) for client in clients]
        states = [s.aggregate(state, updates, number) for s, state in zip((Abmll(), FedAvg()), states, strict=True)]
        assert_same(states[0].adapter, states[1].adapter)
    assert not states[0].memory


def test_theta_moves_less_the_more_it_remembers_and_the_fewer_have_a_row() -> None:
    begun = AdapterState(lora={"m": LoraFactors(torch.zeros(2, 1), torch.zeros(1, 2), 1.0)})
    sent = [
        ClientUpdate(0, AdapterState(lora={"m": LoraFactors(torch.ones(2, 1), torch.ones(1, 2), 1.0)}), 1),
        ClientUpdate(1, AdapterState(lora={"m": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)}), 3),
    ]
    strategy = Abmll(memory=0.5)
    settled = strategy.aggregate(strategy.init(begun), [replace(sent[0], adapter=begun)], 1)
    moved = strategy.aggregate(settled, sent, 2).adapter.lora["m"].A.flatten().tolist()
    assert moved == pytest.approx([1 / 1.5, 0.25 / 0.75])


def test_the_plan_pulls_by_beta_and_sigma() -> None:
    client = ClientInfo(client_id=0, rank=2)

    def terms(strategy: Abmll) -> tuple[Term, ...]:
        return strategy.broadcast(strategy.init(start([client])), client, 1).plan.terms

    assert terms(Abmll(beta=0.2, sigma=0.5)) == (Term("prior", pytest.approx(0.8)),)
    assert terms(Abmll(beta=0.0)) == ()


def test_a_run_without_beta_is_fedavg_and_a_strong_prior_holds_clients_back(tmp_path, tiny_llama) -> None:
    common = {"lora__ranks": "2", "model__quantization": "nf4"}
    found = {}
    for name, options in {
        "fedavg": "",
        "abmll": "beta=0",
        "weak": "beta=1e-7",
        "strong": "beta=1.0, sigma=0.05",
    }.items():
        _, result = run_locally(
            tiny(
                tmp_path,
                tiny_llama,
                run__id=name,
                strategy__name="fedavg" if name == "fedavg" else "abmll",
                strategy__options=options,
                **common,
            )
        )
        found[name] = [result["rounds"][-1]["heldout"]["loss"], sum(result["rounds"][-1]["norms"].values())]
    assert found["abmll"] == found["fedavg"]
    assert found["weak"] != found["fedavg"]
    assert found["weak"] == pytest.approx(found["fedavg"], rel=1e-2)
    assert found["strong"][1] < 0.9 * found["fedavg"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "abmll's beta = -1.0, expected a number of at least 0"),
        ({"sigma": 0.0}, r"abmll's sigma = 0.0, expected a number above 0"),
        ({"memory": 1.0}, "abmll's memory = 1.0, expected a number from 0 to below 1"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Abmll(**options)
