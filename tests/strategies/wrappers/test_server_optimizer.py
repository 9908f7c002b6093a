"""FedOpt over factors: against torch's optimizers and loops, and what must not move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.registry import NAMES, naming_others
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.naive.clients import start, train
from tests.strategies.test_invariants import assert_near, assert_same, dense_deltas

CLIENTS = [ClientInfo(client_id=i, rank=3, alpha=4, num_examples=i + 1) for i in range(3)]
STEADY = [name for name in NAMES if load(name).steady]


def run(strategy: Strategy, rounds: int = 4, clients: list[ClientInfo] = CLIENTS) -> list[ServerState]:
    """The states after every round; what the clients reply depends on what they were sent."""
    states = [strategy.init(start(clients, 1))]
    for round in range(1, rounds + 1):
        updates = [train(strategy.broadcast(states[-1], client, round), client, round) for client in clients]
        states.append(strategy.aggregate(states[-1], updates, round))
    return states


def flat(adapter: AdapterState) -> dict[str, Tensor]:
    factors = {f"{n}.{part}": getattr(f, part).double() for n, f in adapter.lora.items() for part in ("A", "B")}
    return factors | {n: tensor.double() for n, tensor in adapter.tensors.items()}


def changes(strategy: ServerOptimizer, states: list[ServerState]) -> list[dict[str, Tensor]]:
    """What the inner strategy alone would have changed in every round."""
    found = []
    for round, state in enumerate(states[:-1], start=1):
        updates = [train(strategy.broadcast(state, client, round), client, round) for client in CLIENTS]
        after = flat(strategy.inner.aggregate(state, updates, round).adapter)
        found.append({name: after[name] - before for name, before in flat(state.adapter).items()})
    return found


@pytest.mark.parametrize("name", STEADY)
def test_plain_momentum_is_the_inner_strategy(name: str) -> None:
    for plain, wrapped in zip(run(load(name)), run(ServerOptimizer(load(name), beta1=0.0)), strict=True):
        assert_near(flat(wrapped.adapter), flat(plain.adapter), 1e-6)
        assert_near(dense_deltas(wrapped.folds.total()), dense_deltas(plain.folds.total()), 1e-5)


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"kind": "momentum", "lr": 0.5, "beta1": 0.8}, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8)),
        (
            {"kind": "adagrad", "lr": 0.2, "beta1": 0.0, "tau": 0.01},
            lambda p: torch.optim.Adagrad(p, lr=0.2, initial_accumulator_value=0.01**2, eps=0.01),
        ),
    ],
    ids=["momentum", "adagrad"],
)
def test_as_torch_does_it(options: dict[str, Any], optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    strategy = ServerOptimizer(FedAvg(), **options)
    states = run(strategy)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in flat(states[0].adapter).items()}
    steps = optimizer(list(parameters.values()))
    for state, change in zip(states[1:], changes(strategy, states), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = -change[name]
        steps.step()
        assert_near(flat(state.adapter), {n: p.detach() for n, p in parameters.items()}, 1e-5)


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_as_algorithm_2_has_it(kind: str) -> None:
    """Number by number: no bias correction, v_-1 = tau^2, tau beside the root."""
    lr, beta1, beta2, tau = 0.1, 0.7, 0.9, 0.02
    strategy = ServerOptimizer(FedAvg(), kind=kind, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    states = run(strategy)
    numbers = {
        n: [[x, 0.0, tau**2] for x in tensor.flatten().tolist()] for n, tensor in flat(states[0].adapter).items()
    }
    for state, change in zip(states[1:], changes(strategy, states), strict=True):
        for name, entries in numbers.items():
            for entry, d in zip(entries, change[name].flatten().tolist(), strict=True):
                x, m, v = entry
                m = beta1 * m + (1 - beta1) * d
                if kind == "adam":
                    v = beta2 * v + (1 - beta2) * d * d
                elif kind == "yogi":
                    v -= (1 - beta2) * d * d * ((v > d * d) - (v < d * d))
                else:
                    v += d * d
                entry[:] = x + lr * m / (v**0.5 + tau), m, v
        expected = {n: torch.tensor([e[0] for e in entries]) for n, entries in numbers.items()}
        assert_near({n: tensor.flatten() for n, tensor in flat(state.adapter).items()}, expected, 1e-5)


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "adagrad"])
def test_what_stays_stays_to_the_last_bit(kind: str) -> None:
    frozen_a = run(ServerOptimizer(load("ffa"), kind=kind, lr=0.3))
    for module, factors in frozen_a[0].adapter.lora.items():
        assert all(torch.equal(state.adapter.lora[module].A, factors.A) for state in frozen_a)
        assert not torch.equal(frozen_a[1].adapter.lora[module].B, frozen_a[2].adapter.lora[module].B)
    in_turn = run(ServerOptimizer(load("rolora"), kind=kind, lr=0.3))
    for before, after, still in zip(in_turn[:-1], in_turn[1:], "ABAB", strict=True):
        for module, factors in before.adapter.lora.items():
            assert torch.equal(getattr(factors, still), getattr(after.adapter.lora[module], still))


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_module_without_replies_rests_and_goes_on(kind: str) -> None:
    strategy = ServerOptimizer(FedAvg(), kind=kind, lr=0.3)
    state = run(strategy, 2)[-1]

    def replies(number: int, absent: str = "") -> list[ClientUpdate]:
        updates = [train(strategy.broadcast(state, client, number), client, number) for client in CLIENTS]
        return [
            replace(u, adapter=replace(u.adapter, lora={n: f for n, f in u.adapter.lora.items() if n != absent}))
            for u in updates
        ]

    rested = strategy.aggregate(state, replies(3, "layers.0.q"), 3)
    for key, memory in rested.memory.items():
        assert_same(
            AdapterState(lora={"q": memory.lora["layers.0.q"]}),
            AdapterState(lora={"q": state.memory[key].lora["layers.0.q"]}),
        )
    assert torch.equal(rested.adapter.lora["layers.0.q"].A, state.adapter.lora["layers.0.q"].A)
    once, later = strategy.aggregate(state, replies(4), 4), strategy.aggregate(rested, replies(4), 4)
    assert torch.equal(once.adapter.lora["layers.0.q"].B, later.adapter.lora["layers.0.q"].B)


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize("name", ["lora-fair", "fedavg-zeropad", "rblora"])
def test_rows_that_no_sampled_client_has_start_anew(kind: str, name: str) -> None:
    strategy = ServerOptimizer(load(name), kind=kind, lr=0.3, tau=0.02)
    clients = [ClientInfo(client_id=i, rank=rank) for i, rank in enumerate((4, 2, 2))]
    state = strategy.init(start(clients, 1, {"m": (6, 7)}))
    for round, sampled in enumerate((clients, clients, clients[1:], clients[1:], clients[1:]), start=1):
        before = state
        updates = [train(strategy.broadcast(state, client, round), client, round) for client in sampled]
        state = strategy.aggregate(state, updates, round)
        inner = strategy.inner.aggregate(before, updates, round).adapter.lora["m"]
        got = state.adapter.lora["m"]
        if round > 2 and not inner.B[:, 2:].any():
            assert not got.B[:, 2:].any()
            assert torch.equal(got.A[2:], inner.A[2:])
            assert not state.memory["server-optimizer.first"].lora["m"].B[:, 2:].any()
        assert float(delta(got).norm()) < 50
    client = replace(clients[0], client_id=9)
    state = strategy.aggregate(state, [train(strategy.broadcast(state, client, 6), client, 6)], 6)
    assert state.adapter.lora["m"].B[:, 2:].any()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.sampled_from([1, 4, "2r"]), rslora=st.booleans())
def test_the_step_is_taken_at_the_servers_scaling(seed: int, alpha: float | str, rslora: bool) -> None:
    """However the clients scale, the same effective replies give the same effective step."""
    strategy = ServerOptimizer(load("fedavg-zeropad"), kind="adam", lr=0.1, tau=0.02)
    client = ClientInfo(client_id=0, rank=2, alpha=alpha, rslora=rslora)
    state = strategy.init(start([ClientInfo(client_id=0, rank=3, alpha=6)], seed))
    update = train(strategy.broadcast(state, client, 1), client, seed)
    lora = {n: LoraFactors(A=f.scaling / 2 * f.A, B=f.B, scaling=2.0) for n, f in update.adapter.lora.items()}
    rescaled = replace(update, adapter=replace(update.adapter, lora=lora))
    new, other = strategy.aggregate(state, [update], 1), strategy.aggregate(state, [rescaled], 1)
    assert_near(dense_deltas(strategy.global_adapter(new)), dense_deltas(strategy.global_adapter(other)))


def test_a_poor_choice_is_refused() -> None:
    with (
        pytest.raises(StrategyError, match=r"Flora does not keep rows of A .*; .* strategy\.name = .*lora-fair"),
        naming_others(),
    ):
        ServerOptimizer(load("flora"))
    with pytest.raises(StrategyError, match="FedAvg does not keep rows"):
        ServerOptimizer(Restart(FedAvg()))
    with pytest.raises(StrategyError, match="ServerOptimizer wraps the strategy already"):
        Restart(ServerOptimizer(ServerOptimizer(FedAvg())))
    for option, value in [("lr", 0.0), ("lr", float("nan")), ("beta1", 1.0), ("beta2", -0.1), ("tau", 0.0)]:
        with pytest.raises(StrategyError, match=rf"strategy\.server-{option} = {value}, expected"):
            ServerOptimizer(FedAvg(), **{option: value})


def test_class_constants_are_the_inner_ones() -> None:
    for name in STEADY:
        inner, outer = load(name), ServerOptimizer(load(name))
        for constant in ("linear", "unequal_ranks", "steady", "personal", "starts_with", "own_rows"):
            assert getattr(outer, constant) == getattr(inner, constant)
