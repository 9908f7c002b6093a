"""What holds for every registered strategy: a new one is tested by being registered."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.registry import NAMES
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.naive import dense as naive
from tests.naive.clients import BY_CLIENT, OWN_TWIN, SHAPES, HeldBase, Run, dense_deltas, start, started, train, whole

MORE_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora-fair": [{"lam": 0.0}, {"similarity": "cosine"}],
    "flexlora": [{"keep_tail": True}, {"fold_tail": True}],
    "florist": [{"tau": 1.0}],
    "fedsvd": [{"period": 2}],
    "abmll": [{"memory": 0.5}],
    "flasc": [{"tiers": "0.1/0.6/1"}],
}
# weighs clients by the norms of their updates, not by their examples
BY_NORM = {"hetlora"}
# drops the smallest components of what it gets, also from one client alone
TRUNCATING = [("florist", {})]
# keeps a part of what it held before
DAMPED = [("abmll", {"memory": 0.5}), ("flasc", {}), ("flasc", {"tiers": "0.1/0.6/1"})]
VARIANTS = [(name, options) for name in NAMES for options in [{}, *MORE_OPTIONS.get(name, [])]]
WRAPPED: dict[str, Strategy] = {
    "momentum-fedavg": ServerOptimizer(load("fedavg"), beta1=0.0),
    "restart-1-fedavg": Restart(load("fedavg"), every=1),
    "restart-2-fedavg": Restart(load("fedavg"), every=2),
    "bounded-flora": Robust(load("flora"), bound=1e9),
    "uncompacted-flora": Run(load("flora"), compact=False),
    "uncompacted-fedex": Run(load("fedex"), compact=False),
    "limited-tail": Run(load("flexlora", keep_tail=True), max_rank=4),
}


def over(variants: Sequence[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    named = {f"{n}{list(o.items()) if o else ''}": load(n, **o) for n, o in variants} | WRAPPED
    return pytest.mark.parametrize("strategy", named.values(), ids=named)


every_strategy = over(VARIANTS)
by_examples = over([(n, o) for n, o in VARIANTS if n not in BY_NORM | BY_CLIENT])
with_all_of_one = over([(n, o) for n, o in VARIANTS if not load(n, **o).personal and (n, o) not in TRUNCATING + DAMPED])
# spreads a client's ranks over the modules anew in each round
with_own_ranks = over([(n, o) for n, o in VARIANTS if n != "lora-a2"])
few = settings(max_examples=12, deadline=None)


@dataclass(frozen=True)
class Draw:
    """A random federation; `clients` makes it one that the strategy serves."""

    ranks: tuple[int, ...]
    alpha: float | str
    rslora: bool
    examples: tuple[int, ...]
    seed: int

    def clients(self, strategy: Strategy) -> list[ClientInfo]:
        ranks = self.ranks if strategy.unequal_ranks else (self.ranks[0],) * len(self.ranks)
        return [
            ClientInfo(
                client_id=i, rank=r, alpha=self.alpha, num_examples=n, rslora=self.rslora, rank_pattern={"1.v": 2}
            )
            for i, (r, n) in enumerate(zip(ranks, self.examples, strict=True))
        ]


@st.composite
def draws(draw: st.DrawFn, least: int = 1) -> Draw:
    count = draw(st.integers(least, 4))
    return Draw(
        ranks=tuple(draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))),
        alpha=draw(st.sampled_from(["2r", "r", 16, 3.0])),
        rslora=draw(st.booleans()),
        examples=tuple(draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))),
        seed=draw(st.integers(0, 10_000)),
    )


def begin(strategy: Strategy, clients: Sequence[ClientInfo], seed: int) -> tuple[ServerState, list[ClientUpdate]]:
    """A state with one round behind it, and the replies of round 2."""
    state = begun(strategy, clients, seed)
    state = strategy.aggregate(state, replies(strategy, state, clients, 1, seed), 1)
    return state, replies(strategy, state, clients, 2, seed + 1)


def begun(strategy: Strategy, clients: Sequence[ClientInfo], seed: int = 0) -> ServerState:
    """The state before round 1, after the statistics that the strategy asks for."""
    return started(strategy, strategy.init(start(clients, seed)), clients, seed)


def replies(
    strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], number: int, seed: int
) -> list[ClientUpdate]:
    return [train(strategy.broadcast(state, client, number), client, seed) for client in clients]


def assert_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    for name, matrix in expected.items():
        error = float((got[name] - matrix).norm())
        assert error <= tolerance * (1.0 + float(matrix.norm())), f"{name}: {error}"


def assert_same(left: AdapterState, right: AdapterState) -> None:
    """Equal to the last bit."""
    assert left.lora.keys() == right.lora.keys()
    assert left.tensors.keys() == right.tensors.keys()
    for name, factors in left.lora.items():
        assert torch.equal(factors.A, right.lora[name].A)
        assert torch.equal(factors.B, right.lora[name].B)
        assert factors.scaling == right.lora[name].scaling
    assert all(torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items())


def effective(adapter: AdapterState) -> dict[str, Tensor]:
    """Every module's update, with a core R between the factors where the adapter has one."""
    return {
        name: f.scaling * (f.B.double() @ (torch.eye(f.rank) if f.R is None else f.R).double() @ f.A.double())
        for name, f in adapter.lora.items()
    }


def outcome(strategy: Strategy, state: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    new = strategy.aggregate(state, updates, 2)
    dense = {k: v.double() for k, v in new.adapter.tensors.items()}
    if strategy.personal:  # nothing of it is a model without a client's own factors
        return {f"{name}.A": f.scaling * f.A.double() for name, f in new.adapter.lora.items()} | dense
    return dense_deltas(strategy.global_adapter(new)) | dense


@with_all_of_one
@few
@given(draw=draws())
def test_one_client_is_identity(strategy: Strategy, draw: Draw) -> None:
    client = draw.clients(strategy)[0]
    state, held = begun(strategy, [client], draw.seed), HeldBase()
    for round in (1, 2, 3):
        sent = strategy.broadcast(state, replace(client, known_base_version=held.version), round)
        held.apply(sent)
        reply = train(sent, client, draw.seed + round)
        state = strategy.aggregate(state, [reply], round)
        own, base = effective(whole(sent, reply)), dense_deltas(held.folds)
        expected = {name: update + base.get(name, 0.0) for name, update in own.items()}
        assert_near(dense_deltas(strategy.global_adapter(state)), expected)


@every_strategy
@few
@given(draw=draws(least=2))
def test_order_does_not_matter(strategy: Strategy, draw: Draw) -> None:
    state, updates = begin(strategy, draw.clients(strategy), draw.seed)
    assert_near(outcome(strategy, state, updates[::-1]), outcome(strategy, state, updates))


@pytest.mark.parametrize("strategy", [load("flora"), load("lora-fair")], ids=["flora", "lora-fair"])
def test_order_does_not_show_in_the_bits_where_all_replies_are_held(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=i + 1, num_examples=i + 1) for i in range(3)]
    state, updates = begin(strategy, clients, 5)
    new, other = strategy.aggregate(state, updates, 2), strategy.aggregate(state, updates[::-1], 2)
    assert_same(replace(strategy.global_adapter(new), tensors={}), replace(strategy.global_adapter(other), tensors={}))


@by_examples
@few
@given(draw=draws())
def test_a_client_split_in_two_halves_changes_nothing(strategy: Strategy, draw: Draw) -> None:
    clients = [replace(client, num_examples=2 * client.num_examples) for client in draw.clients(strategy)]
    state, updates = begin(strategy, clients, draw.seed)
    first = updates[0]
    half = first.num_examples // 2
    halves = [replace(first, num_examples=half), replace(first, num_examples=half, client_id=99)]
    # Without its ridge LoRA-FAIR solves what more rows than inputs make singular: rounding grows by the condition.
    tolerance = 1e-3 if getattr(strategy, "lam", 1.0) == 0 else 2e-5
    assert_near(outcome(strategy, state, [*halves, *updates[1:]]), outcome(strategy, state, updates), tolerance)


@every_strategy
@few
@given(draw=draws(), count=st.integers(2, 5))
def test_equal_clients_change_nothing(strategy: Strategy, draw: Draw, count: int) -> None:
    state, updates = begin(strategy, draw.clients(strategy)[:1], draw.seed)
    copies = [replace(updates[0], client_id=i, num_examples=i + 1) for i in range(count)]
    assert_near(outcome(strategy, state, copies), outcome(strategy, state, updates))


@every_strategy
@few
@given(draw=draws(), factor=st.integers(2, 1000))
def test_only_the_shares_of_examples_matter(strategy: Strategy, draw: Draw, factor: int) -> None:
    state, updates = begin(strategy, draw.clients(strategy), draw.seed)
    scaled = [replace(update, num_examples=factor * update.num_examples) for update in updates]
    assert_near(outcome(strategy, state, scaled), outcome(strategy, state, updates))


@every_strategy
@few
@given(draw=draws())
def test_dense_tensors_are_averaged_over_those_that_sent_them(strategy: Strategy, draw: Draw) -> None:
    state, updates = begin(
        strategy, [*draw.clients(strategy), replace(draw.clients(strategy)[0], client_id=50)], draw.seed
    )
    silent = replace(updates[-1], adapter=replace(updates[-1].adapter, tensors={}))
    new = strategy.aggregate(state, [*updates[:-1], silent], 2)
    total = sum(update.num_examples for update in updates[:-1])
    heads = [update.adapter.tensors["head.weight"] for update in updates[:-1]]
    expected = naive.mean(heads, [update.num_examples / total for update in updates[:-1]])
    torch.testing.assert_close(new.adapter.tensors["head.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(strategy.global_adapter(new).tensors["head.weight"], new.adapter.tensors["head.weight"])
    sent = strategy.broadcast(new, draw.clients(strategy)[0], 3)
    assert torch.equal(sent.adapter.tensors["head.weight"], new.adapter.tensors["head.weight"])


def without(update: ClientUpdate, module: str) -> ClientUpdate:
    lora = {name: factors for name, factors in update.adapter.lora.items() if name != module}
    dense = {name: tensor for name, tensor in update.adapter.tensors.items() if not name.startswith(module)}
    return replace(update, adapter=AdapterState(lora=lora, tensors=dense))


def of(module: str, outcomes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of an outcome that is about one module: its update, or its A and its core."""
    found = {name: tensor for name, tensor in outcomes.items() if name.startswith(module)}
    assert found
    return found


@every_strategy
@few
@given(draw=draws(least=2))
def test_a_module_is_averaged_over_the_clients_that_sent_it(strategy: Strategy, draw: Draw) -> None:
    state, updates = begin(strategy, draw.clients(strategy), draw.seed)
    got = outcome(strategy, state, [without(updates[0], "layers.0.q"), *updates[1:]])
    absent, present = outcome(strategy, state, updates[1:]), outcome(strategy, state, updates)
    assert_near(got, present | of("layers.0.q", absent))


@every_strategy
def test_a_module_that_nobody_sent_stays(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=3) for i in range(2)]
    state, updates = begin(strategy, clients, 3)
    before = dense_deltas(strategy.global_adapter(state))["layers.0.q"]
    new = strategy.aggregate(state, [without(update, "layers.0.q") for update in updates], 2)
    assert_near(of("layers.0.q", dense_deltas(strategy.global_adapter(new))), {"layers.0.q": before})
    if strategy.steady:
        assert torch.equal(new.adapter.lora["layers.0.q"].A, state.adapter.lora["layers.0.q"].A)


@every_strategy
def test_fault_8_aggregate_is_pure(strategy: Strategy) -> None:
    """Nothing given is changed, and nothing of an earlier call is averaged in again (fault 8)."""
    clients = [ClientInfo(client_id=i, rank=3, num_examples=i + 1) for i in range(3)]
    state, updates = begin(strategy, clients, 7)
    state_before, sent_before = copy.deepcopy(state), copy.deepcopy([update.adapter for update in updates])
    once = strategy.aggregate(state, updates, 2)
    first = copy.deepcopy(once)
    again = strategy.aggregate(state, updates, 2)
    for left, right in ((first, again), (once, again), (state, state_before)):
        assert_same(left.adapter, right.adapter)
        assert_same(left.folds.total(), right.folds.total())
        assert left.folds.version == right.folds.version
    for update, kept in zip(updates, sent_before, strict=True):
        assert_same(update.adapter, kept)


@every_strategy
def test_a_new_state_shares_no_memory_with_the_replies(strategy: Strategy) -> None:
    client = ClientInfo(client_id=0, rank=3)
    state, updates = begin(strategy, [client], 1)
    new = strategy.aggregate(state, updates, 2)
    before = copy.deepcopy(strategy.global_adapter(new))
    for factors in updates[0].adapter.lora.values():
        factors.A.add_(1.0)
        factors.B.add_(1.0)
    for tensor in updates[0].adapter.tensors.values():
        tensor.add_(1.0)
    assert_same(strategy.global_adapter(new), before)


@every_strategy
def test_state_and_options_are_frozen(strategy: Strategy) -> None:
    state = strategy.init(start([ClientInfo(client_id=0, rank=2)]))
    for value in (state, state.adapter, state.folds, strategy):
        assert dataclasses.is_dataclass(value)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, next(iter(dataclasses.fields(value))).name if dataclasses.fields(value) else "x", None)


@every_strategy
def test_state_goes_through_pickle(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=3) for i in range(2)]
    state, updates = begin(strategy, clients, 4)
    copied = pickle.loads(pickle.dumps(state))
    left, right = strategy.aggregate(state, updates, 2), strategy.aggregate(copied, updates, 2)
    assert_same(strategy.global_adapter(left), strategy.global_adapter(right))


@every_strategy
def test_same_seed_is_bitwise_equal(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=3, num_examples=i + 1) for i in range(3)]

    def run() -> tuple[AdapterState, AdapterState]:
        state, updates = begin(strategy, clients, 11)
        state = strategy.aggregate(state, updates, 2)
        return strategy.global_adapter(state), strategy.broadcast(state, clients[1], 3).adapter

    for left, right in zip(run(), run(), strict=True):
        assert_same(left, right)


@every_strategy
def test_replies_are_consumed_lazily_and_once(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=3, num_examples=i + 1) for i in range(3)]
    state, updates = begin(strategy, clients, 5)

    class Once:
        started, given = 0, 0

        def __iter__(self) -> Iterator[ClientUpdate]:
            self.started += 1
            for update in updates:
                self.given += 1
                yield update

    stream = Once()
    new = strategy.aggregate(state, stream, 2)
    assert (stream.started, stream.given) == (1, 3)
    assert_same(strategy.global_adapter(new), strategy.global_adapter(strategy.aggregate(state, updates, 2)))


@every_strategy
def test_a_round_without_replies_is_refused(strategy: Strategy) -> None:
    state = strategy.init(start([ClientInfo(client_id=0, rank=2)]))
    with pytest.raises(StrategyError, match="round 4: no client's reply"):
        strategy.aggregate(state, [], 4)


@with_own_ranks
def test_fault_3_every_client_gets_its_own_ranks_and_scalings(strategy: Strategy) -> None:
    """Fault 3: not the last client's; also with a rank pattern, and whatever the state has been through."""
    ranks = (5, 2, 1, 3) if strategy.unequal_ranks else (3, 3, 3, 3)
    clients = [ClientInfo(client_id=i, rank=r, alpha=8, rank_pattern={"v": 2}) for i, r in enumerate(ranks)]
    strategy.check(clients)
    state, _ = begin(strategy, clients, 5)
    for current in (begun(strategy, clients), state):
        for client in clients:
            sent = strategy.broadcast(current, client, 2)
            assert sent.adapter.lora.keys() == SHAPES.keys()
            for name, factors in sent.adapter.lora.items():
                rank = 2 if name.endswith("v") else client.rank
                assert factors.A.shape == (rank, SHAPES[name][1])
                assert factors.B.shape == (SHAPES[name][0], rank)
                assert factors.scaling == 8 / rank


@every_strategy
def test_the_global_adapter_covers_every_module_from_the_start(strategy: Strategy) -> None:
    state = strategy.init(start([ClientInfo(client_id=0, rank=2)]))
    learned = strategy.global_adapter(state)
    assert learned.lora.keys() == SHAPES.keys()
    assert all(factors.scaling == 1.0 for factors in learned.lora.values())
    assert all(not matrix.any() for matrix in dense_deltas(learned).values())


@every_strategy
def test_bf16_replies_are_summed_in_fp32(strategy: Strategy) -> None:
    clients = [ClientInfo(client_id=i, rank=3) for i in range(3)]
    state, updates = begin(strategy, clients, 2)
    narrow = [
        replace(
            u,
            adapter=AdapterState(
                lora={n: LoraFactors(f.A.bfloat16(), f.B.bfloat16(), f.scaling) for n, f in u.adapter.lora.items()},
                tensors={n: tensor.bfloat16() for n, tensor in u.adapter.tensors.items()},
            ),
        )
        for u in updates
    ]
    widened = [
        replace(
            u,
            adapter=AdapterState(
                lora={n: LoraFactors(f.A.float(), f.B.float(), f.scaling) for n, f in u.adapter.lora.items()},
                tensors={n: tensor.float() for n, tensor in u.adapter.tensors.items()},
            ),
        )
        for u in narrow
    ]
    assert_near(outcome(strategy, state, narrow), outcome(strategy, state, widened))


ROUNDS_OF = {1: (0, 1, 2), 2: (0, 2), 3: (0, 1), 4: (0, 1, 2, 3), 5: (0, 3), 6: (0, 1, 2, 3)}


@pytest.mark.parametrize("name", [n for n in NAMES if not (n in OWN_TWIN or load(n).personal or load(n).starts_with)])
def test_rounds_match_a_dense_reference(name: str) -> None:
    """Base, anchor and adapter tracked densely; partial participation, a late client; training sees the base.

    A client's step is one of gradient descent on |W + s B A - target|^2 / 2, so that an error in what a client
    is sent, or in the base that it trains on, spreads to all that follows.
    """
    strategy = load(name)
    reference = importlib.import_module(f"tests.naive.{name.replace('-', '_')}")
    ranks = (4, 2, 1, 4) if strategy.unequal_ranks else (3, 3, 3, 3)
    clients = [
        ClientInfo(client_id=i, rank=r, alpha="r" if i % 2 or not strategy.unequal_ranks else 4, num_examples=3 * i + 1)
        for i, r in enumerate(ranks)
    ]
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    targets = [
        {n: w + 0.5 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in base.items()}
        for _ in clients
    ]
    begun = start(clients, 3)
    twin = {n: reference.Module(f.A, f.B, f.scaling) for n, f in begun.lora.items()}
    state, held = strategy.init(begun), [HeldBase() for _ in clients]

    def step(
        weight: Tensor, A: Tensor, B: Tensor, scaling: float, target: Tensor, trained: Collection[str]
    ) -> tuple[Tensor, Tensor]:
        A, B = A.double(), B.double()
        error = weight + scaling * (B @ A) - target
        rate_a, rate_b = 0.05 * ("A" in trained), 0.05 * ("B" in trained)
        return A - rate_a * scaling * (B.T @ error), B - rate_b * scaling * (error @ A.T)

    for round, chosen in ROUNDS_OF.items():
        updates, parts = [], {n: [] for n in SHAPES}
        for j in chosen:
            client = replace(clients[j], known_base_version=held[j].version)
            sent = strategy.broadcast(state, client, round)
            held[j].apply(sent)
            weights = held[j].weights(base)
            lora = {}
            for n, f in sent.adapter.lora.items():
                A, B = step(weights[n], f.A, f.B, f.scaling, targets[j][n], sent.plan.train)
                lora[n] = LoraFactors(
                    A.float() if "A" in sent.plan.send else torch.empty(0, 0),
                    B.float() if "B" in sent.plan.send else torch.empty(0, 0),
                    f.scaling,
                )
                own_a, own_b = twin[n].send(client.rank_of(n), client.scaling_of(n), state.adapter.lora[n].A)
                trained = getattr(twin[n], "trained", "AB")
                own_a, own_b = step(
                    base[n] + twin[n].anchor, own_a, own_b, client.scaling_of(n), targets[j][n], trained
                )
                parts[n].append(naive.Part(own_a, own_b, client.scaling_of(n), client.num_examples))
            updates.append(ClientUpdate(client_id=j, adapter=AdapterState(lora=lora), num_examples=client.num_examples))
        state = strategy.aggregate(state, iter(updates), round)
        for n in SHAPES:
            twin[n].aggregate(parts[n])
        assert_near(dense_deltas(strategy.global_adapter(state)), {n: twin[n].total() for n in sorted(SHAPES)}, 1e-4)


@every_strategy
def test_fault_10_late_clients_end_up_with_bit_equal_weights(strategy: Strategy) -> None:
    """Fault 10: always on, on every other round, late, restarted: one base, compacted on the way or not."""
    own_anchors = strategy.replaces_folds  # there, clients of one rank hold the same
    ranks = (5, 2, 1, 4) if strategy.unequal_ranks and not own_anchors else (3, 3, 3, 3)
    clients = [ClientInfo(client_id=i, rank=r, num_examples=i + 1) for i, r in enumerate(ranks)]
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(4)) for name, shape in SHAPES.items()}
    state, held = begun(strategy, clients), [HeldBase() for _ in clients]
    present = {1: (0,), 2: (0, 1), 3: (0,), 4: (0, 1, 2), 5: (0, 2), 6: (0, 1, 2, 3)}
    for round, on in present.items():
        if round == 5:
            held[2] = HeldBase()
        updates = []
        for j in on:
            sent = strategy.broadcast(state, replace(clients[j], known_base_version=held[j].version), round)
            held[j].apply(sent)
            updates.append(train(sent, clients[j], round))
        always = held[0].weights(base)
        for j in on[1:]:
            assert all(torch.equal(weight, always[name]) for name, weight in held[j].weights(base).items())
        if not own_anchors:
            expected = dense_deltas(state.folds.total())
            assert_near({n: (w - base[n]).double() for n, w in always.items() if n in expected}, expected)
        state = strategy.aggregate(state, updates, round)
