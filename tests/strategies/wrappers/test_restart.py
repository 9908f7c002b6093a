"""Chains of LoRA: FLoRA as a special case, a dense chain, nothing lost at the restarts."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState, compress, stack
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.tools.replies import gather
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.naive.clients import SHAPES, HeldBase, Run, start, train, whole
from tests.naive.dense import Part
from tests.strategies.test_invariants import assert_near, assert_same, dense_deltas

EQUAL = [ClientInfo(client_id=i, rank=2, alpha=3, num_examples=i + 1) for i in range(3)]
UNEQUAL = [
    ClientInfo(client_id=i, rank=rank, alpha=alpha, num_examples=2 * i + 1)
    for i, (rank, alpha) in enumerate([(4, 4), (2, "2r"), (1, 3)])
]


@dataclass(frozen=True)
class Stacked(Strategy):
    """Keeps the whole ideal as its adapter, at any rank."""

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        parts, dense = gather(updates, number)
        lora = {name: stack(part.factors, part.shares) for name, part in parts.items()}
        return replace(state, adapter=AdapterState(lora={**state.adapter.lora, **lora}, tensors=dense))


def step(
    strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], held: Sequence[HeldBase], number: int
) -> ServerState:
    """One round, in which what a client replies depends on its base and on what it is sent."""
    updates = []
    for client, base in zip(clients, held, strict=True):
        sent = strategy.broadcast(state, replace(client, known_base_version=base.version), number)
        assert not sent.steady
        base.apply(sent)
        pull = sum(
            float(tensor.sum()) for tensor in base.weights({n: torch.zeros(s) for n, s in SHAPES.items()}).values()
        )
        updates.append(train(sent, client, number, size=0.2 + 0.1 * abs(pull) / (1 + abs(pull))))
    return strategy.aggregate(state, updates, number)


@pytest.mark.parametrize(
    "inner",
    [load("flexlora", keep_tail=True), Robust(load("flexlora", keep_tail=True), bound=1e9)],
    ids=["bare", "robust"],
)
def test_every_round_over_a_strategy_that_keeps_everything_is_flora(inner: Strategy) -> None:
    flora, chain = Run(Flora(), seed=5), Run(Restart(inner, every=1), seed=5)
    chain.check(UNEQUAL)
    states = [strategy.init(start(UNEQUAL, 2)) for strategy in (flora, chain)]
    held = [[HeldBase() for _ in UNEQUAL] for _ in states]
    for round in range(1, 6):
        sent = [s.broadcast(state, UNEQUAL[1], round) for s, state in zip((flora, chain), states, strict=True)]
        assert_same(sent[0].adapter, sent[1].adapter)
        states = [step(*run, round) for run in zip((flora, chain), states, (UNEQUAL, UNEQUAL), held, strict=True)]
        ours, theirs = (s.global_adapter(state) for s, state in zip((chain, flora), states, strict=True))
        assert_near(dense_deltas(ours), dense_deltas(theirs))
        assert torch.equal(ours.tensors["head.weight"], theirs.tensors["head.weight"])
        for left, right in zip(*held, strict=True):
            assert left.version == right.version == round - 1
            assert_near(dense_deltas(left.folds), dense_deltas(right.folds))


def test_a_stack_of_larger_rank_becomes_one_fold() -> None:
    chain = Restart(Stacked(), every=1)
    state = chain.init(start(UNEQUAL, 2, {"m": (12, 11)}))
    updates = [train(chain.broadcast(state, client, 1), client, 1) for client in UNEQUAL]
    new = chain.aggregate(state, updates, 1)
    assert new.folds.parts[0].lora["m"].rank == 7
    assert_near(dense_deltas(new.folds.total()), dense_deltas(Flora().aggregate(state, updates, 1).folds.total()))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", ["fedavg", "fedex", "ffa", "lora-fair", "flexlora"])
def test_a_chain_of_dense_runs(name: str, every: int) -> None:
    """Each link is a naive run of its own, on a base that has the links before it."""
    chain = Run(Restart(load(name), every=every), seed=3)
    reference = importlib.import_module(f"tests.naive.{name.replace('-', '_')}")
    state, past = chain.init(start(EQUAL, 3)), {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    held = [HeldBase() for _ in EQUAL]
    twin = {n: reference.Module(f.A, f.B, f.scaling) for n, f in state.adapter.lora.items()}
    for round in range(1, 7):
        updates, parts = [], {n: [] for n in SHAPES}
        for client, base in zip(EQUAL, held, strict=True):
            sent = chain.broadcast(state, replace(client, known_base_version=base.version), round)
            base.apply(sent)
            reply = train(sent, client, round)
            frozen = dense_deltas(base.folds)
            for n, f in whole(sent, reply).lora.items():
                expected = twin[n].send(client.rank, f.scaling, state.adapter.lora[n].A)
                got = sent.adapter.lora[n]
                assert_near(
                    {"dW": got.scaling * got.B.double() @ got.A.double()}, {"dW": f.scaling * expected[1] @ expected[0]}
                )
                assert_near({n: frozen.get(n, 0 * past[n])}, {n: past[n] + twin[n].anchor}, 1e-4)
                parts[n].append(Part(f.A.double(), f.B.double(), f.scaling, client.num_examples))
            updates.append(reply)
        state = chain.aggregate(state, updates, round)
        for n in SHAPES:
            twin[n].aggregate(parts[n])
        assert_near(
            dense_deltas(chain.global_adapter(state)), {n: past[n] + twin[n].total() for n in sorted(SHAPES)}, 1e-4
        )
        if round % every == 0:
            assert not any(f.B.any() for f in state.adapter.lora.values())
            past = {n: past[n] + twin[n].total() for n in SHAPES}
            twin = {n: reference.Module(f.A, f.B, f.scaling) for n, f in state.adapter.lora.items()}


@pytest.mark.parametrize("every", [1, 2])
def test_the_rank_of_the_sum_grows_and_nothing_is_lost(every: int) -> None:
    chain, shapes = Restart(FedAvg(), every=every), {"m": (16, 12)}
    state, ranks = chain.init(start(EQUAL, 0, shapes)), []
    for round in range(1, 7):
        updates = [train(chain.broadcast(state, client, round), client, round) for client in EQUAL]
        plain = FedAvg().aggregate(state, updates, round)
        new = chain.aggregate(state, updates, round)
        assert_near(dense_deltas(chain.global_adapter(new)), dense_deltas(FedAvg().global_adapter(plain)), 1e-6)
        state = new
        ranks.append(compress(chain.global_adapter(state).lora)["m"].rank)
    assert ranks == ([2, 4, 6, 8, 10, 12] if every == 1 else [2, 2, 4, 4, 6, 6])
    assert state.folds.version == 6 // every


def test_folds_are_compacted_within_the_limit() -> None:
    chain = Run(Restart(FedAvg(), every=1), max_rank=3)
    state = chain.init(start(EQUAL, 0, {"m": (16, 12)}))
    for round in range(1, 5):
        state = chain.aggregate(
            state, [train(chain.broadcast(state, client, round), client, round) for client in EQUAL], round
        )
    assert state.folds.total().lora["m"].rank == 3
    assert state.folds.version == 4


def test_the_optimizers_moments_end_with_their_link() -> None:
    chain = Run(Restart(ServerOptimizer(FedAvg(), kind="adam", lr=0.1), every=2), seed=1)
    state = chain.init(start(EQUAL, 4))
    for round in range(1, 5):
        updates = [train(chain.broadcast(state, client, round), client, round) for client in EQUAL]
        stepped = chain.inner.aggregate(state, updates, round)
        state = chain.aggregate(state, updates, round)
        assert_near(dense_deltas(chain.global_adapter(state)), dense_deltas(chain.inner.global_adapter(stepped)), 1e-6)
        assert bool(state.memory) == (round % 2 == 1)
        assert torch.equal(state.adapter.tensors["head.weight"], stepped.adapter.tensors["head.weight"])


def test_restarts_depend_on_seed_and_round_alone() -> None:
    def fresh(seed: int, number: int, examples: int) -> Tensor:
        chain = Run(Restart(FedAvg(), every=1), seed=seed)
        state = chain.init(start(EQUAL, 0))
        client = replace(EQUAL[0], num_examples=examples)
        return (
            chain.aggregate(state, [train(chain.broadcast(state, client, 1), client, examples)], number)
            .adapter.lora["layers.0.q"]
            .A
        )

    assert torch.equal(fresh(0, 1, 1), fresh(0, 1, 2))
    assert not torch.equal(fresh(0, 1, 1), fresh(0, 2, 1))
    assert not torch.equal(fresh(0, 1, 1), fresh(1, 1, 1))


def test_a_is_never_trained_while_b_is_zero() -> None:
    for every in (2, 4):
        Restart(load("rolora"), every=every).check(EQUAL)
    for every in (1, 3):
        chain = Restart(load("rolora"), every=every)
        with pytest.raises(
            StrategyError, match=f"round {every + 1} starts from B = 0, where A has no gradient, and RoLora"
        ):
            chain.check(EQUAL)
    with pytest.raises(StrategyError, match="round 2 starts from B = 0"):
        Restart(Robust(load("rolora")), every=1).check(EQUAL)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"FedSa leaves B on the clients; set strategy\.restart-every = 0"):
        Restart(load("fedsa"))
    with pytest.raises(StrategyError, match=r"FedSb needs what lora\.init = lora-sb makes; set"):
        Restart(load("fedsb"))
    with pytest.raises(StrategyError, match=r"FrLora needs what lora\.init = pissa makes; set"):
        Restart(load("frlora"))
    with pytest.raises(StrategyError, match="FlexLora takes back folds of the round before"):
        Restart(Robust(load("flexlora", keep_tail=True)), every=2)
    with pytest.raises(StrategyError, match=r"restart-every = 0, expected at least 1"):
        Restart(FedAvg(), every=0)
    with pytest.raises(StrategyError, match="needs one rank"):
        Restart(FedAvg()).check(UNEQUAL)
