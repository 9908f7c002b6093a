"""Robust rules against dense loops; a poisoned minority must not move the result."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, map_tensors
from fedlora.adapters.state import difference
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.wrappers.distances import Move, squared_distances
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.naive.clients import asked, start, train
from tests.naive.clients import begin as begin_from
from tests.naive.dense import product
from tests.strategies.test_invariants import assert_near, assert_same, begin, begun, dense_deltas, outcome, without

RULES: list[dict[str, Any]] = [
    {"rule": "norm-bound", "bound": 1.5},
    {"rule": "median"},
    {"rule": "trimmed-mean", "trim": 0.3},
    {"rule": "krum", "byzantine": 2},
    {"rule": "multi-krum", "byzantine": 2},
]
every_rule = pytest.mark.parametrize("options", RULES, ids=lambda o: o["rule"])
few = settings(max_examples=6, deadline=None)


def clients(count: int, ranks: Sequence[int] = (3,), alpha: float | str = 4) -> list[ClientInfo]:
    return [ClientInfo(client_id=i, rank=ranks[i % len(ranks)], alpha=alpha, num_examples=i + 1) for i in range(count)]


def dense_of(strategy: Strategy, state: ServerState, update: ClientUpdate, everyone: Sequence[ClientInfo]) -> Tensor:
    """All that a client ended with as one long vector, by dense products."""
    client = next(c for c in everyone if c.client_id == update.client_id)
    sent, vectors = strategy.broadcast(state, client, 2).adapter, list[Tensor]()
    for name in sorted(state.adapter.lora):
        f, old = update.adapter.lora[name], sent.lora[name]
        A, B = (f.A if f.A.numel() else old.A), (f.B if f.B.numel() else old.B)
        A = A if f.R is None else f.R.double() @ A.double()
        vectors.append(product(B, A, f.scaling).flatten())
    return torch.cat([*vectors, *(update.adapter.tensors[n].double().flatten() for n in sorted(state.adapter.tensors))])


@few
@given(seed=st.integers(0, 999), name=st.sampled_from(["flora", "flexlora", "ffa", "rolora", "fedex", "rblora"]))
def test_distances_are_those_of_the_dense_updates(seed: int, name: str) -> None:
    everyone, strategy = clients(4, (3, 1, 4, 2), "2r" if seed % 2 else 5), load(name)
    state, updates = begin(strategy, everyone, seed)
    vectors = [dense_of(strategy, state, update, everyone) for update in updates]
    expected = torch.tensor([[float((x - y).square().sum()) for y in vectors] for x in vectors], dtype=torch.float64)
    torch.testing.assert_close(squared_distances(updates, state), expected, rtol=1e-6, atol=1e-9)


@few
@given(seed=st.integers(0, 999))
def test_refactored_and_padded_copies_have_no_distance(seed: int) -> None:
    """(B M, M^-1 A) is the same update, and so is one with a row that does nothing; the difference is not rounding."""
    everyone = clients(4)
    state, updates = begin(FedAvg(), everyone, seed)
    generator = torch.Generator().manual_seed(seed)
    lora, more = {}, {}
    for name, f in updates[0].adapter.lora.items():
        mixer = torch.randn(3, 3, generator=generator).double() + 3 * torch.eye(3)
        lora[name] = LoraFactors(A=torch.linalg.inv(mixer) @ f.A.double(), B=f.B.double() @ mixer, scaling=f.scaling)
        more[name] = LoraFactors(
            A=torch.cat([f.A, f.A[:1]]).double(), B=torch.cat([f.B, 0 * f.B[:, :1]], dim=1), scaling=f.scaling
        )
        nudge = 1e-7 * float(f.A.norm())
        more[name].A[0, 0] += nudge if name == "layers.0.q" else 0.0
    copies = [
        replace(updates[0], client_id=7 + i, adapter=replace(updates[0].adapter, lora=f))
        for i, f in enumerate((lora, more))
    ]
    found = squared_distances([*updates, *copies], state)
    f = updates[0].adapter.lora["layers.0.q"]
    nudged = (f.scaling * 1e-7 * float(f.A.norm()) * float(f.B[:, 0].norm())) ** 2
    assert found[0, 4] < 1e-20 * found[0, 1]
    assert float(found[0, 5]) == pytest.approx(nudged, rel=1e-3)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()


def krum_by_loops(vectors: Sequence[Tensor], byzantine: int, keep: int) -> list[int]:
    scores = []
    for i, x in enumerate(vectors):
        others = sorted(float((x - y).square().sum()) for j, y in enumerate(vectors) if j != i)
        scores.append(sum(others[: len(vectors) - byzantine - 2]))
    return sorted(sorted(range(len(vectors)), key=lambda i: scores[i])[:keep])


@pytest.mark.parametrize("name", ["flora", "flexlora", "rolora"])
@few
@given(seed=st.integers(0, 999), byzantine=st.integers(0, 2), keep=st.integers(0, 4))
def test_krum_by_loops(name: str, seed: int, byzantine: int, keep: int) -> None:
    everyone, strategy = clients(7, (3, 1, 2)), load(name)
    state, updates = begin(strategy, everyone, seed)
    vectors = [dense_of(strategy, state, update, everyone) for update in updates]
    for rule, wanted in (("krum", 1), ("multi-krum", keep or 7 - byzantine)):
        chosen = [updates[i] for i in krum_by_loops(vectors, byzantine, wanted)]
        got = outcome(Robust(strategy, rule=rule, byzantine=byzantine, keep=keep), state, updates)
        assert_near(got, outcome(strategy, state, chosen), 1e-6)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("name", ["fedavg", "ffa", "flora"])
def test_middles_by_loops(name: str, count: int, rule: str) -> None:
    everyone, strategy = clients(count), load(name)
    state, updates = begin(strategy, everyone, count)

    def middle(tensors: Sequence[Tensor]) -> Tensor:
        flat = []
        for values in zip(*(tensor.double().flatten().tolist() for tensor in tensors), strict=True):
            if rule == "median":
                flat.append(statistics.median(values))
            else:
                drop = {3: 1, 4: 1, 7: 2}[count]
                flat.append(statistics.mean(sorted(values)[drop : count - drop]))
        return torch.tensor(flat).reshape(tensors[0].shape)

    lora = {
        n: LoraFactors(
            middle([u.adapter.lora[n].A for u in updates]), middle([u.adapter.lora[n].B for u in updates]), f.scaling
        )
        for n, f in updates[0].adapter.lora.items()
    }
    dense = {n: middle([u.adapter.tensors[n] for u in updates]) for n in updates[0].adapter.tensors}
    one = ClientUpdate(client_id=0, adapter=AdapterState(lora=lora, tensors=dense), num_examples=1)
    got = outcome(Robust(strategy, rule=rule, trim=0.2), state, updates)
    assert_near(got, outcome(strategy, state, [one]), 1e-6)


def test_middles_are_taken_at_one_scaling() -> None:
    """Replies of equal effective factors count as equal, whatever the client's alpha."""
    everyone = [ClientInfo(client_id=i, rank=2, alpha=alpha) for i, alpha in enumerate((2, 4, 8))]
    strategy = Robust(Flora(), rule="median")
    state = strategy.init(start(everyone, 1))
    first = train(strategy.broadcast(state, everyone[0], 1), everyone[0], 1)
    updates = [first]
    for client in everyone[1:]:
        s = client.scaling_of("")
        lora = {n: LoraFactors(A=f.A / s, B=f.B, scaling=s) for n, f in first.adapter.lora.items()}
        updates.append(replace(first, client_id=client.client_id, adapter=replace(first.adapter, lora=lora)))
    got = dense_deltas(strategy.global_adapter(strategy.aggregate(state, updates, 1)))
    assert_near(got, dense_deltas(first.adapter), 1e-6)


@pytest.mark.parametrize("claim", [10, 10**9])
def test_a_claim_of_examples_does_not_outweigh_a_bounded_norm(claim: int) -> None:
    """What one client can pull is its distance and its weight, and both are bounded by the others' middle."""
    everyone = [replace(client, num_examples=10) for client in clients(5)]
    state, updates = begin(FedAvg(), everyone, 0)
    loud = [*updates[:4], replace(updates[4], num_examples=claim)]
    got = outcome(Robust(FedAvg(), bound=2.0), state, loud)
    most = [*updates[:4], replace(updates[4], num_examples=min(claim, 20))]
    assert_near(got, outcome(Robust(FedAvg(), bound=2.0), state, most), 1e-12)


@pytest.mark.parametrize("name", ["flora", "fedavg", "flexlora", "ffa", "rolora", "fedex"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 999), bound=st.sampled_from([1.0, 1.3]))
def test_norms_are_bounded_by_dense_loops(name: str, seed: int, bound: float) -> None:
    """What was too far off is at the limit, on its line, and so are claims of examples; the rest is as it came."""
    strategy = load(name)
    everyone = clients(4, (3, 1, 4, 2) if strategy.unequal_ranks else (3,))
    state, updates = begin(strategy, everyone, seed)
    starts = [strategy.broadcast(state, client, 2).adapter for client in everyone]
    updates = [scaled_move(*pair, by) for *pair, by in zip(updates, starts, (1.0, 8.0, 0.5, 1.5), strict=True)]

    def distance(update: ClientUpdate, start: AdapterState) -> float:
        squares = 0.0
        for n, f in update.adapter.lora.items():
            old = start.lora[n]
            B, A = (f.B if f.B.numel() else old.B).double(), (f.A if f.A.numel() else old.A).double()
            squares += float((f.scaling * (B @ A) - old.scaling * (old.B.double() @ old.A.double())).square().sum())
        for n, tensor in update.adapter.tensors.items():
            squares += float((tensor.double() - start.tensors[n].double()).square().sum())
        return squares**0.5

    lengths = [distance(*pair) for pair in zip(updates, starts, strict=True)]
    for update, length in zip(updates, lengths, strict=True):
        assert Move.of(update).norm(1.0) == pytest.approx(length, rel=1e-6)
    limit = bound * sorted(lengths)[1]
    assert max(lengths) > limit
    expected = []
    for update, start_, length in zip(updates, starts, lengths, strict=True):
        if length <= limit:
            expected.append(update)
            continue
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            short = distance(scaled_move(update, start_, middle), start_) <= limit
            low, high = (middle, high) if short else (low, middle)
        expected.append(scaled_move(update, start_, low))
        assert distance(expected[-1], start_) == pytest.approx(limit, rel=1e-5)
    claims = sorted(update.num_examples for update in updates)
    expected = [replace(u, num_examples=min(u.num_examples, int(bound * claims[1]))) for u in expected]
    assert_near(outcome(Robust(strategy, bound=bound), state, updates), outcome(strategy, state, expected), 1e-5)


def scaled_move(update: ClientUpdate, start: AdapterState, by: float) -> ClientUpdate:
    """The client's factors and tensors at another point of the line from where they started."""

    def point(old: Tensor, end: Tensor) -> Tensor:
        return (old.double() + by * (end.double() - old.double())).float() if end.numel() else end

    lora = {
        n: LoraFactors(point(start.lora[n].A, f.A), point(start.lora[n].B, f.B), f.scaling)
        for n, f in update.adapter.lora.items()
    }
    dense = {n: point(start.tensors[n], tensor) for n, tensor in update.adapter.tensors.items()}
    return replace(update, adapter=AdapterState(lora=lora, tensors=dense))


def poisoned(update: ClientUpdate, size: float) -> ClientUpdate:
    """Sign-flipped and blown up, with a claim to a million examples."""
    adapter = map_tensors(lambda name, x: x if name == "A" else -size * x, update.adapter)
    return replace(update, adapter=adapter, num_examples=1_000_000)


@every_rule
@pytest.mark.parametrize("name", ["fedavg", "flora", "flexlora", "ffa"])
@pytest.mark.parametrize("where", [(0, 1), (3, 6)])
def test_a_poisoned_minority_does_not_move_the_result(
    options: dict[str, Any], name: str, where: tuple[int, int]
) -> None:
    strategy, everyone = load(name), clients(7)
    robust = Robust(strategy, **options)
    state = begun(strategy, everyone, 3)
    head = state.adapter.tensors["head.weight"]
    updates = []
    for client in everyone:
        update = train(strategy.broadcast(state, client, 1), client, 5, size=0.02)
        near = {"head.weight": head + 0.02 * (update.adapter.tensors["head.weight"] - head)}
        updates.append(replace(update, adapter=replace(update.adapter, tensors=near), num_examples=1))
    bad = [poisoned(u, 300.0) if u.client_id in where else u for u in updates]
    good = [u for u in updates if u.client_id not in where]
    honest = outcome(strategy, state, good)
    before = dense_deltas(strategy.global_adapter(state)) | {"head.weight": head.double()}

    def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
        return sum(float((left[n] - right[n]).square().sum()) for n in honest) ** 0.5

    assert apart(outcome(strategy, state, bad), honest) > 100 * apart(honest, before)
    # a single reply is sqrt(5) times as far off as the mean of five, and a bounded one at most 1.5 times as far
    assert apart(outcome(robust, state, bad), honest) < 5 * apart(honest, before)
    if options["rule"] == "multi-krum":
        assert_near(outcome(robust, state, bad), honest, 1e-9)


def test_krum_sees_the_dense_tensors() -> None:
    everyone = clients(5)
    state, updates = begin(FedAvg(), everyone, 1)
    head = {"head.weight": 100 + updates[2].adapter.tensors["head.weight"]}
    updates[2] = replace(updates[2], adapter=replace(updates[2].adapter, tensors=head))
    got = outcome(Robust(FedAvg(), rule="multi-krum"), state, updates)
    assert_near(got, outcome(FedAvg(), state, [u for u in updates if u.client_id != 2]), 1e-9)


@every_rule
def test_one_client_and_equal_clients_are_left_as_they_are(options: dict[str, Any]) -> None:
    state, updates = begin(FedAvg(), clients(1), 1)
    copies = [replace(updates[0], client_id=i, num_examples=i + 1) for i in range(7)]
    assert_near(outcome(Robust(FedAvg(), **options), state, copies), outcome(FedAvg(), state, updates))
    if options["rule"] in ("norm-bound", "median"):
        assert_near(outcome(Robust(FedAvg(), **options), state, updates), outcome(FedAvg(), state, updates))


@every_rule
def test_order_and_examples_do_not_show(options: dict[str, Any]) -> None:
    """Nor does a module that some clients did not send stop anything."""
    strategy = Robust(FedAvg(), **options)
    state, updates = begin(FedAvg(), clients(7), 2)
    updates[1] = without(updates[1], "layers.0.q")
    left, right = strategy.aggregate(state, updates, 2), strategy.aggregate(state, iter(updates[::-1]), 2)
    assert_same(strategy.global_adapter(left), strategy.global_adapter(right))
    nobody = [without(update, "layers.0.q") for update in updates]
    kept = strategy.aggregate(state, nobody, 2).adapter.lora["layers.0.q"]
    assert torch.equal(kept.A, state.adapter.lora["layers.0.q"].A)
    if options["rule"] not in ("norm-bound", "multi-krum"):
        equal = [replace(update, num_examples=1) for update in updates]
        assert_same(strategy.aggregate(state, equal, 2).adapter, left.adapter)


def test_round_zero_and_cores_are_filtered_too() -> None:
    strategy, everyone = Robust(load("fedsb"), rule="multi-krum", byzantine=2), clients(7, (3, 2))
    state = strategy.init(start(everyone, 1))
    updates = [train(asked(strategy, state, client), client, 1) for client in everyone]
    bad = [poisoned(u, 50.0) if u.client_id in (2, 3) else u for u in updates]
    begun_well = begin_from(load("fedsb"), state, [u for u in updates if u.client_id not in (2, 3)])
    state = begin_from(strategy, state, bad)
    assert_same(state.adapter, begun_well.adapter)
    updates = [train(strategy.broadcast(state, client, 1), client, 2) for client in everyone]
    bad = [poisoned(u, 50.0) if u.client_id in (2, 3) else u for u in updates]
    well = load("fedsb").aggregate(state, [u for u in updates if u.client_id not in (2, 3)], 1)
    assert_same(strategy.aggregate(state, bad, 1).adapter, well.adapter)
    bounded = Robust(load("fedsb"), bound=1.0).aggregate(state, bad, 1)
    steps = [*difference(bounded.adapter, state.adapter).tensors.values()]
    steps += [f.R - state.adapter.lora[n].R for n, f in bounded.adapter.lora.items()]
    median = sorted(Move.of(u).norm(1.0) for u in bad)[3]
    assert sum(float(step.square().sum()) for step in steps) ** 0.5 <= median * 1.001


@pytest.mark.parametrize("wrap", [lambda s: Restart(s, every=2), ServerOptimizer], ids=["restart", "optimizer"])
def test_it_filters_alike_inside_and_outside(wrap: Any) -> None:
    left: Strategy = Robust(wrap(FedAvg()), rule="multi-krum", byzantine=1)
    right: Strategy = wrap(Robust(FedAvg(), rule="multi-krum", byzantine=1))
    results = []
    for strategy in (left, right):
        state = strategy.init(start(clients(5), 1))
        for round in range(1, 4):
            updates = [train(strategy.broadcast(state, client, round), client, round) for client in clients(5)]
            state = strategy.aggregate(state, updates, round)
        results.append(strategy.global_adapter(state))
    assert_same(*results)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"rule": "krum"}, 4, r"needs 5 clients, got 4; sample more clients"),
        ({"rule": "multi-krum", "byzantine": 2}, 6, r"byzantine = 2 needs 7 clients, got 6"),
        ({"rule": "multi-krum", "byzantine": 1, "keep": 5}, 5, r"robust-keep = 5 needs 6 clients, got 5"),
        ({"rule": "trimmed-mean", "trim": 0.34}, 4, r"robust-trim = 0\.34 drops 4 values of 4 clients"),
        ({"rule": "trimmed-mean"}, 2, r"drops 2 values of 2 clients"),
    ],
)
def test_too_few_clients_are_refused(options: dict[str, Any], count: int, message: str) -> None:
    strategy = Robust(FedAvg(), **options)
    with pytest.raises(StrategyError, match=f"the run: .*{message}"):
        strategy.check(clients(count))
    state, updates = begin(FedAvg(), clients(count), 1)
    with pytest.raises(StrategyError, match=f"round 2: .*{message}"):
        strategy.aggregate(state, updates, 2)


def test_trimming_rounds_up() -> None:
    for count, trim, dropped in [(30, 0.1, 3), (4, 0.2, 1), (5, 0.2, 1), (6, 0.2, 2), (3, 0.0, 0)]:
        values = [ClientUpdate(i, AdapterState(tensors={"w": torch.tensor([float(2**i)])}), 1) for i in range(count)]
        new = Robust(FedAvg(), rule="trimmed-mean", trim=trim).aggregate(ServerState(AdapterState()), values, 1)
        kept = [float(2**i) for i in range(dropped, count - dropped)]
        assert float(new.adapter.tensors["w"]) == pytest.approx(sum(kept) / len(kept))


def test_what_does_not_fit_is_refused() -> None:
    for rule in ("median", "trimmed-mean"):
        strategy = Robust(Flora(), rule=rule)
        assert not strategy.unequal_ranks
        with pytest.raises(
            StrategyError, match=r"the clients: .* needs one rank, got ranks 3, 1, 3; set .*norm-bound, krum"
        ):
            strategy.check(clients(3, (3, 1)))
        state, updates = begin(Flora(), clients(3, (3, 1)), 1)
        with pytest.raises(StrategyError, match=r"layers\.0\.q: .* needs one rank, got ranks 3, 1, 3"):
            strategy.aggregate(state, updates, 2)
        with pytest.raises(StrategyError, match="FedSb's statistics have a basis for each client"):
            Robust(load("fedsb"), rule=rule)
        wide = replace(updates[0], adapter=replace(updates[0].adapter, tensors={"head.weight": torch.zeros(2, 4)}))
        usual = [replace(updates[0], client_id=i) for i in (1, 2)]
        with pytest.raises(StrategyError, match=r"head\.weight: clients sent shapes \[\(2, 3\), \(2, 4\)\]"):
            strategy.aggregate(state, [wide, *usual], 2)
    for rule in ("norm-bound", "krum"):
        assert Robust(Flora(), rule=rule).unequal_ranks
        with pytest.raises(StrategyError, match=r"FedSa leaves B on the clients; set strategy\.robust = none"):
            Robust(load("fedsa"), rule=rule)
    assert not Robust(FedAvg()).linear
    for option, value in [("bound", 0.5), ("trim", 0.5), ("byzantine", -1), ("keep", -1)]:
        with pytest.raises(StrategyError, match=rf"robust-{option} = {value}, expected"):
            Robust(FedAvg(), **{option: value})


def test_krum_scores_agree_with_all_subsets() -> None:
    """The sum of the n - f - 2 smallest distances is the least of the sums over all such subsets."""
    state, updates = begin(Flora(), clients(5, (2, 3)), 4)
    distances = squared_distances(updates, state)
    scores = [
        min(sum(float(distances[i, j]) for j in group) for group in combinations(set(range(5)) - {i}, 2))
        for i in range(5)
    ]
    chosen = updates[scores.index(min(scores))]
    assert_near(outcome(Robust(Flora(), rule="krum"), state, updates), outcome(Flora(), state, [chosen]), 1e-9)
