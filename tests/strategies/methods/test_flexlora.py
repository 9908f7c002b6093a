"""FlexLoRA against the dense SVD, and the tail that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters import relative_error
from fedlora.common.errors import StrategyError
from fedlora.config import Scalar, parse
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.configured import configured
from fedlora.strategies.methods.flexlora import FlexLora
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, HeldBase, Run, dense_deltas, start, train
from tests.naive.drawn import before, replies, updates_of
from tests.naive.factored import ideal
from tests.naive.flexlora import best

FLEXLORA, TAIL, FOLDED = FlexLora(), FlexLora(keep_tail=True), FlexLora(fold_tail=True)
CLIENTS = [ClientInfo(client_id=i, rank=r, alpha=16, num_examples=3 * i + 2) for i, r in enumerate((4, 2, 1))]


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    error = float((got - expected).norm())
    assert error <= tolerance * (1 + float(expected.norm())), error


@settings(max_examples=40, deadline=None)
@given(parts=replies(), scaling=st.sampled_from([0.5, 2.0]), more=st.integers(0, 2))
def test_equals_the_dense_svd_cut_to_the_largest_rank(parts: list[naive.Part], scaling: float, more: int) -> None:
    state = FLEXLORA.init(before(parts, more, scaling))
    got = FLEXLORA.global_adapter(FLEXLORA.aggregate(state, updates_of(parts), 1))
    near(dense_deltas(got)["m"], best(naive.ideal(parts), state.adapter.lora["m"].rank))


@settings(max_examples=40, deadline=None)
@given(parts=replies(), alpha=st.sampled_from(["2r", 16]), rslora=st.booleans())
def test_every_client_gets_its_best_approximation_at_its_own_scaling(
    parts: list[naive.Part], alpha: float | str, rslora: bool
) -> None:
    state = FLEXLORA.aggregate(FLEXLORA.init(before(parts)), updates_of(parts), 1)
    exact = naive.ideal(parts)
    values = torch.linalg.svdvals(exact)
    for rank in range(1, state.adapter.lora["m"].rank + 1):
        client = ClientInfo(client_id=0, rank=rank, alpha=alpha, rslora=rslora)
        sent = FLEXLORA.broadcast(state, client, 2).adapter
        assert sent.lora["m"].rank == rank
        assert sent.lora["m"].scaling == client.scaling_of("m")
        got = dense_deltas(sent)["m"]
        near(got, best(exact, rank))
        assert float((got - exact).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-6, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(parts=replies(), rank=st.integers(1, 6))
def test_fault_4_both_factors_carry_the_root_of_s(parts: list[naive.Part], rank: int) -> None:
    """|row i of A|^2 = |column i of B|^2 = S_i / s_j, at every client's own scaling."""
    state = FLEXLORA.aggregate(FLEXLORA.init(before(parts)), updates_of(parts), 1)
    rank = min(rank, state.adapter.lora["m"].rank)
    values = torch.linalg.svdvals(naive.ideal(parts))[:rank]
    sent = FLEXLORA.broadcast(state, ClientInfo(client_id=0, rank=rank, alpha=3.0), 2).adapter.lora["m"]
    alive = int((values > 1e-6 * values[0]).sum())
    expected = (values[:alive] / sent.scaling).sqrt()
    torch.testing.assert_close(sent.A.norm(dim=1)[:alive], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sent.B.norm(dim=0)[:alive], expected, rtol=1e-6, atol=1e-6)


def test_fault_2_one_alpha_and_unequal_ranks_keep_their_effective_scales() -> None:
    state = FLEXLORA.init(start(CLIENTS))
    updates = [train(FLEXLORA.broadcast(state, c, 1), c, seed=1) for c in CLIENTS]
    got = dense_deltas(FLEXLORA.global_adapter(FLEXLORA.aggregate(state, updates, 1)))
    for name in SHAPES:
        parts = parts_of(updates, name)
        assert [part.scaling for part in parts] == [4.0, 8.0, 16.0]
        near(got[name], best(naive.ideal(parts), 4), 1e-5)
        assert not torch.allclose(got[name], best(naive.ideal([replace(p, scaling=1.0) for p in parts]), 4), rtol=0.1)


def test_round_1_starts_from_the_given_adapter_as_drawn_whatever_the_scaling() -> None:
    begun = start(CLIENTS)
    for strategy in (FLEXLORA, TAIL):
        sent = strategy.broadcast(strategy.init(begun), CLIENTS[2], 1)
        assert (sent.base_version, sent.folds, sent.folds_from) == (0, (), 0)
        for name, f in sent.adapter.lora.items():
            assert torch.equal(f.A, begun.lora[name].A[:1])
            assert f.scaling == 16.0


@pytest.mark.parametrize("strategy", [FLEXLORA, TAIL])
def test_rows_without_a_component_keep_the_servers_a_and_train_again(strategy: FlexLora) -> None:
    """Only the rank-1 client replied: rows 1 to 3 would be zero in both factors, and have no gradient for ever."""
    begun = start(CLIENTS)
    state = strategy.init(begun)
    update = train(strategy.broadcast(state, CLIENTS[2], 1), CLIENTS[2], seed=1)
    state = strategy.aggregate(state, [update], 1)
    sent = strategy.broadcast(state, CLIENTS[0], 2)
    assert sent.folds == ()
    for name, f in sent.adapter.lora.items():
        assert torch.equal(f.A[1:], begun.lora[name].A[1:])
        assert not f.B[:, 1:].any()
        assert f.B[:, 0].any()
    grown = strategy.aggregate(state, [train(sent, CLIENTS[0], seed=2)], 2)
    for name, f in grown.adapter.lora.items():
        rank = min(4, *SHAPES[name])
        assert bool(f.B[:, :rank].any(dim=0).all())


def test_replies_that_did_not_move_leave_the_server_as_it_is() -> None:
    state = FLEXLORA.init(start(CLIENTS))
    sent = [FLEXLORA.broadcast(state, c, 1) for c in CLIENTS]
    echoes = [echo(s, c) for s, c in zip(sent, CLIENTS, strict=True)]
    new = FLEXLORA.aggregate(state, echoes, 1)
    for name, f in new.adapter.lora.items():
        assert torch.equal(f.A, state.adapter.lora[name].A)
        assert not f.B.any()


def echo(sent: Broadcast, client: ClientInfo) -> ClientUpdate:
    """A client that trained nothing."""
    return ClientUpdate(client_id=client.client_id, adapter=sent.adapter, num_examples=client.num_examples)


def parts_of(updates: Sequence[ClientUpdate], module: str) -> list[naive.Part]:
    sent = [(u.adapter.lora[module], u.num_examples) for u in updates if module in u.adapter.lora]
    return [naive.Part(f.A, f.B, f.scaling, n) for f, n in sent]


def a_round(
    strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], number: int, seed: int
) -> tuple[list[ClientUpdate], list[dict[str, Tensor]]]:
    """The replies, and each client's anchor as a dense matrix by module."""
    updates, anchors = [], []
    for client in clients:
        sent, held = strategy.broadcast(state, client, number), HeldBase()
        held.apply(sent)
        updates.append(train(sent, client, seed + number))
        frozen = dense_deltas(held.folds)
        anchors.append({n: frozen.get(n, torch.zeros(s, dtype=torch.float64)) for n, s in SHAPES.items()})
    return updates, anchors


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    alpha=st.sampled_from(["2r", 16, 3.0]),
    rslora=st.booleans(),
    absent=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 9999),
)
def test_keep_tail_is_the_dense_mean_of_full_models_over_rounds(
    ranks: list[int], alpha: float | str, rslora: bool, absent: list[int], seed: int
) -> None:
    """Every client's anchor + adapter is the one global model, and the next is sum_k p_k (anchor_k + adapter_k)."""
    clients = [
        ClientInfo(client_id=i, rank=r, alpha=alpha, num_examples=3 * i + 1, rslora=rslora, rank_pattern={"1.v": 1})
        for i, r in enumerate(ranks)
    ]
    state, versions = TAIL.init(start(clients, seed)), []
    for round in (1, 2, 3, 4):
        versions.append(state.folds.version)
        whole = dense_deltas(TAIL.global_adapter(state))
        for client in clients:
            sent, held = TAIL.broadcast(state, client, round), HeldBase()
            held.apply(sent)
            own, frozen = dense_deltas(sent.adapter), dense_deltas(held.folds)
            for name, model in whole.items():
                near(own[name] + frozen.get(name, 0.0), model, 1e-5)
        present = [c for c in clients if c.client_id != absent[round - 1]] or clients
        updates, anchors = a_round(TAIL, state, present, round, seed)
        state = TAIL.aggregate(state, updates, round)
        got = dense_deltas(TAIL.global_adapter(state))
        shares = [u.num_examples / sum(u.num_examples for u in updates) for u in updates]
        for name in SHAPES:
            models = [a[name] + dense_deltas(u.adapter)[name] for a, u in zip(anchors, updates, strict=True)]
            near(got[name], naive.mean(models, shares), 1e-5)
    assert versions == [0, 1, 2, 3]


def test_keep_tail_moves_nothing_where_nobody_trains_and_the_paper_does() -> None:
    """Without the tail, components that small ranks lack shrink by their share in every round, though none trains."""
    after = {}
    for strategy in (FLEXLORA, TAIL):
        state = strategy.init(start(CLIENTS))
        state = strategy.aggregate(state, [train(strategy.broadcast(state, c, 1), c, seed=1) for c in CLIENTS], 1)
        first = dense_deltas(strategy.global_adapter(state))
        for round in (2, 3, 4):
            state = strategy.aggregate(state, [echo(strategy.broadcast(state, c, round), c) for c in CLIENTS], round)
        last = dense_deltas(strategy.global_adapter(state))
        after[strategy] = {name: float((last[name] - first[name]).norm() / first[name].norm()) for name in SHAPES}
    assert all(gap < 1e-5 for gap in after[TAIL].values())
    assert after[FLEXLORA]["layers.0.q"] > 0.1


def test_keep_tail_counts_a_client_only_where_it_sent() -> None:
    state = TAIL.init(start(CLIENTS))
    for round in (1, 2):
        updates, anchors = a_round(TAIL, state, CLIENTS, round, 7)
        if round == 1:
            state = TAIL.aggregate(state, updates, 1)
    fewer = {name: f for name, f in updates[2].adapter.lora.items() if name == "layers.0.v"}
    none = {n: {m: f for m, f in u.adapter.lora.items() if m != "layers.1.q"} for n, u in enumerate(updates[:2])}
    updates = [replace(u, adapter=replace(u.adapter, lora=none[i])) for i, u in enumerate(updates[:2])] + [
        replace(updates[2], adapter=replace(updates[2].adapter, lora=fewer))
    ]
    held = dense_deltas(TAIL.global_adapter(state))
    got = dense_deltas(TAIL.global_adapter(TAIL.aggregate(state, updates, 2)))
    for name in SHAPES:
        sent = [i for i, u in enumerate(updates) if name in u.adapter.lora]
        if not sent:
            assert name == "layers.1.q"
            assert torch.equal(got[name], held[name])
            continue
        parts = parts_of(updates, name)
        models = [anchors[i][name] + naive.product(p.B, p.A, p.scaling) for i, p in zip(sent, parts, strict=True)]
        near(got[name], naive.mean(models, naive.shares(parts)), 1e-5)


def test_keep_tail_sends_the_anchor_whole_under_a_new_version_every_round() -> None:
    """A client that holds any version, this one included, drops it: other ranks hold other anchors of it."""
    state = TAIL.init(start(CLIENTS))
    for round in (1, 2):
        state = TAIL.aggregate(state, a_round(TAIL, state, CLIENTS, round, 3)[0], round)
    for known in (0, 1, 2):
        sent = TAIL.broadcast(state, replace(CLIENTS[2], known_base_version=known), 3)
        assert (sent.base_version, sent.folds_from, len(sent.folds)) == (2, 0, 1)
        for name, f in sent.folds[0].lora.items():
            assert f.rank == min(SHAPES[name]) - 1


def test_keep_tail_leaves_out_a_module_without_a_tail() -> None:
    state = TAIL.init(start(CLIENTS))
    state = TAIL.aggregate(state, a_round(TAIL, state, CLIENTS, 1, 3)[0], 1)
    assert set(TAIL.broadcast(state, CLIENTS[0], 2).folds[0].lora) == {"layers.0.q", "layers.0.v"}  # min(d) > 4


@pytest.mark.parametrize(("max_rank", "kept"), [(5, 5), (2, 4), (0, 6)])
def test_max_rank_bounds_what_is_kept_but_not_below_the_largest_client(max_rank: int, kept: int) -> None:
    strategy = Run(TAIL, max_rank=max_rank)
    state = strategy.init(start(CLIENTS))
    updates = a_round(strategy, state, CLIENTS, 1, 3)[0]
    state = strategy.aggregate(state, updates, 1)
    got = dense_deltas(strategy.global_adapter(state))
    for name in SHAPES:
        near(got[name], best(naive.ideal(parts_of(updates, name)), kept), 1e-5)
    assert strategy.global_adapter(state).lora["layers.0.q"].rank == kept


@pytest.mark.parametrize("max_rank", [0, 8])
def test_without_keep_tail_max_rank_changes_nothing(max_rank: int) -> None:
    strategy = Run(FLEXLORA, max_rank=max_rank, compact=False)
    state = strategy.init(start(CLIENTS))
    state = strategy.aggregate(state, a_round(strategy, state, CLIENTS, 1, 3)[0], 1)
    assert state.folds.version == 0
    assert all(f.rank == 4 for f in state.adapter.lora.values())
    assert strategy.broadcast(state, CLIENTS[1], 2).folds == ()


def test_keep_tail_and_merged_folds_are_refused() -> None:
    keys: dict[str, Scalar] = {"strategy.name": "flexlora", "anchor.base-update": "merge", "model.quantization": "none"}
    assert configured(parse(keys)) == FlexLora()
    with pytest.raises(StrategyError, match=r"takes folds back that it sent a round before.*set anchor.base-update"):
        configured(parse({**keys, "strategy.options": "keep-tail=true"}))


def test_components_of_rounding_are_no_components() -> None:
    """Two updates cancel to a ten-millionth, of rank 1; what rounding leaves beside it is no second component."""
    torch.manual_seed(0)
    A, B, b = torch.randn(1, 5).double(), torch.randn(6, 1).double(), torch.randn(6, 1).double()
    parts = [naive.Part(A, B, 1.0, 1), naive.Part(A, 1e-7 * b - B, 1.0, 1)]
    begun = before(parts, more=1)
    got = FLEXLORA.aggregate(FLEXLORA.init(begun), updates_of(parts), 1).adapter.lora["m"]
    near(1e7 * got.scaling * got.B @ got.A, b @ A / 2, 1e-5)
    assert torch.equal(got.A[1], begun.lora["m"].A[1])
    assert not got.B[:, 1].any()


def test_a_tail_that_is_gone_is_not_kept() -> None:
    """A later update beside which the tail is rounding leaves no tail."""
    torch.manual_seed(0)
    parts = [naive.Part(torch.randn(1, 5).double(), torch.randn(6, 1).double(), 1.0, 1) for _ in range(3)]
    state = TAIL.aggregate(TAIL.init(before(parts)), updates_of(parts), 1)
    assert state.folds.total().lora["m"].rank == 2
    huge = naive.Part(parts[0].A, 1e9 * parts[0].B, 1.0, 1)
    state = TAIL.aggregate(state, updates_of([huge]), 2)
    assert state.folds.version == 2
    assert not state.folds.total().lora


@settings(max_examples=40, deadline=None)
@given(parts=replies(), more=st.integers(0, 2))
def test_fold_tail_loses_nothing_of_the_ideal(parts: list[naive.Part], more: int) -> None:
    """The adapter is still the best part at the largest rank, and the fold is what that misses."""
    state = FOLDED.aggregate(FOLDED.init(before(parts, more)), updates_of(parts), 1)
    exact, rank = naive.ideal(parts), state.adapter.lora["m"].rank
    assert relative_error(FOLDED.global_adapter(state).lora, ideal(updates_of(parts))) < 1e-6
    near(dense_deltas(state.adapter)["m"], best(exact, rank))
    folded = dense_deltas(state.folds.total())
    near(folded.get("m", torch.zeros_like(exact)), exact - best(exact, rank))


@pytest.mark.parametrize("max_rank", [0, 3])
def test_fold_tail_adds_up_over_rounds(max_rank: int) -> None:
    """Each round leaves the folds before it and the new ideal, in fp32; a limit of the folds is kept."""
    strategy = Run(FOLDED, max_rank=max_rank)
    state = strategy.init(start(CLIENTS, shapes={"m": (60, 50)}))
    for round in (1, 2, 3):
        folded = dense_deltas(state.folds.total())
        updates = [train(strategy.broadcast(state, c, round), c, seed=round) for c in CLIENTS]
        state = strategy.aggregate(state, updates, round)
        got, exact = dense_deltas(strategy.global_adapter(state))["m"], naive.ideal(parts_of(updates, "m"))
        if max_rank:
            assert state.folds.total().lora["m"].rank <= max_rank
        else:
            near(got, exact + folded.get("m", 0.0), 1e-6)
            assert state.folds.parts[-1].lora["m"].rank == 7 - 4


def test_fold_tail_sends_all_clients_the_same_folds_once() -> None:
    state = FOLDED.init(start(CLIENTS, shapes={"m": (60, 50)}))
    for round in (1, 2):
        state = FOLDED.aggregate(
            state, [train(FOLDED.broadcast(state, c, round), c, seed=round) for c in CLIENTS], round
        )
    first, last = (FOLDED.broadcast(state, replace(c, known_base_version=1), 3) for c in (CLIENTS[0], CLIENTS[2]))
    assert (first.base_version, first.folds_from, len(first.folds)) == (2, 1, 1)
    assert first.folds == last.folds


def test_a_folded_tail_does_not_return_to_the_adapter_and_a_kept_one_does() -> None:
    """Both totals are the mean of the clients' whole models; what is trained next differs."""
    first = [naive.Part(torch.eye(2, 5)[:1], 2.0 * torch.eye(6, 2)[:, :1], 1.0, 1)]
    first += [naive.Part(torch.eye(2, 5)[1:], torch.eye(6, 2)[:, 1:], 1.0, 1)]
    states = {}
    for strategy in (TAIL, FOLDED):
        state = strategy.aggregate(strategy.init(before(first, scaling=1.0)), updates_of(first), 1)
        sent = strategy.broadcast(state, ClientInfo(client_id=0, rank=1, alpha="r"), 2).adapter.lora["m"]
        forgot = [naive.Part(sent.A, 0.1 * sent.B, 1.0, 1)]  # the strongest component all but goes
        states[strategy] = strategy.aggregate(state, updates_of(forgot), 2)
    kept, folded = (dense_deltas(s.global_adapter(states[s]))["m"] for s in (TAIL, FOLDED))
    near(kept, folded)
    adapters = [dense_deltas(states[s].adapter)["m"] for s in (TAIL, FOLDED)]
    near(adapters[0], 0.5 * torch.outer(torch.eye(6)[1], torch.eye(5)[1]).double())
    near(adapters[1], 0.1 * torch.outer(torch.eye(6)[0], torch.eye(5)[0]).double())


def test_fold_tail_may_be_merged_and_is_not_combined_with_keep_tail() -> None:
    keys: dict[str, Scalar] = {"strategy.name": "flexlora", "anchor.base-update": "merge", "model.quantization": "none"}
    assert configured(parse({**keys, "strategy.options": "fold-tail=true"})) == FOLDED
    with pytest.raises(StrategyError, match=r"keep_tail sends .* and its fold_tail folds it for good; set one of them"):
        configured(parse({"strategy.name": "flexlora", "strategy.options": "fold-tail=true, keep-tail=true"}))
