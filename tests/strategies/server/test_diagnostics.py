"""A round's numbers against dense matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.server.diagnostics import diagnose
from tests.naive import dense as naive
from tests.naive.clients import SHAPES, HeldBase, dense_deltas, start, train, whole

RANKS = (4, 2, 1, 3)


def play(strategy: Strategy, rounds: int) -> tuple[ServerState, ServerState, list[ClientUpdate], dict[int, Broadcast]]:
    """Rounds 1 to `rounds`; the states around the last one, its replies and broadcasts."""
    ranks = RANKS if strategy.unequal_ranks else (3, 3, 3, 3)
    clients = [ClientInfo(client_id=i, rank=r, num_examples=i + 1, alpha=4) for i, r in enumerate(ranks)]
    before = after = strategy.init(start(clients))
    updates: list[ClientUpdate] = []
    sent: dict[int, Broadcast] = {}
    for round in range(1, rounds + 1):
        before = after
        sent = {c.client_id: strategy.broadcast(before, c, round) for c in clients}
        updates = [train(sent[c.client_id], c, round) for c in clients]
        after = strategy.aggregate(before, updates, round)
    return before, after, updates, sent


NAMES = ["fedavg", "flora", "lora-fair", "fedavg-zeropad", "flexlora", "fedex", "florist", "raflora"]
NAMES += ["rolora", "fslora", "lora-a2", "fed-plora", "flasc"]


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("strategy", [*map(load, NAMES), load("flexlora", keep_tail=True)], ids=[*NAMES, "keep-tail"])
def test_numbers_match_dense_matrices(strategy: Strategy, rounds: int) -> None:
    before, after, updates, sent = play(strategy, rounds)
    got = diagnose(before, after, updates, sent)
    n = sum(update.num_examples for update in updates)
    error = size = apart = moved = tail = energy = 0.0
    effective: list[float] = []
    ways: list[dict[str, torch.Tensor]] = [{} for _ in updates]
    assert got.norms is not None
    for name in SHAPES:
        trained, starts, frozen = [], [], []
        for update in updates:
            broadcast = sent[update.client_id]
            base = HeldBase()
            base.apply(replace(broadcast, folds_from=0))
            trained.append(dense_deltas(whole(broadcast, update))[name])
            starts.append(dense_deltas(broadcast.adapter)[name])
            frozen.append(dense_deltas(base.folds).get(name, torch.zeros(SHAPES[name], dtype=torch.float64)))
        p = [update.num_examples / n for update in updates]
        ideal = naive.mean(trained, p)
        target = naive.mean([f + t for f, t in zip(frozen, trained, strict=True)], p)
        error += float((dense_deltas(strategy.global_adapter(after))[name] - target).square().sum())
        size += float(ideal.square().sum())
        moves = [t - s for t, s in zip(trained, starts, strict=True)]
        for way, move in zip(ways, moves, strict=True):
            way[name] = move
        common = naive.mean(moves, p)
        apart += sum(pk * float((m - common).square().sum()) for pk, m in zip(p, moves, strict=True))
        moved += sum(pk * float(m.square().sum()) for pk, m in zip(p, moves, strict=True))
        values = torch.linalg.svdvals(ideal)
        tail += float(values[after.adapter.lora[name].rank :].square().sum())
        energy += float(values.square().sum())
        shares = [float(v / values.sum()) for v in values]
        effective.append(math.exp(-sum(s * math.log(s) for s in shares if s > 0)))
        assert got.norms[name] == pytest.approx(float(ideal.norm()), rel=1e-5)
    assert got.error == pytest.approx((error / size) ** 0.5, rel=1e-3, abs=2e-6)
    assert got.drift == pytest.approx((apart / moved) ** 0.5, rel=1e-4)
    assert got.update_cosine == pytest.approx(naive_cosine(ways), rel=1e-4, abs=1e-6)
    assert got.tail_energy == pytest.approx(tail / energy, rel=1e-4, abs=1e-7)
    assert got.effective_rank == pytest.approx(sum(effective) / len(effective), rel=1e-3)


def test_equal_clients_do_not_drift_and_opposite_ones_do() -> None:
    strategy = load("fedavg")
    clients = [ClientInfo(client_id=i, rank=2) for i in range(2)]
    state = strategy.init(start(clients))
    sent = {c.client_id: strategy.broadcast(state, c, 1) for c in clients}
    one = train(sent[0], clients[0], 1)
    same = [one, replace(one, client_id=1)]
    got = diagnose(state, strategy.aggregate(state, same, 1), same, sent)
    assert got.drift == pytest.approx(0.0, abs=1e-6)
    assert got.error == pytest.approx(0.0, abs=1e-6)
    lora = {name: replace(f, B=-f.B) for name, f in one.adapter.lora.items()}
    opposite = [one, replace(one, client_id=1, adapter=replace(one.adapter, lora=lora))]
    got = diagnose(state, strategy.aggregate(state, opposite, 1), opposite, sent)
    assert got.drift == pytest.approx(1.0)


def test_too_many_terms_are_not_diagnosed() -> None:
    strategy = load("flora")
    clients = [ClientInfo(client_id=i, rank=40) for i in range(30)]
    state = strategy.init(start(clients))
    sent = {c.client_id: strategy.broadcast(state, c, 1) for c in clients}
    updates = [train(sent[c.client_id], c, 1) for c in clients]
    got = diagnose(state, strategy.aggregate(state, updates, 1), updates, sent)
    assert got.error is None
    assert got.norms is None


def test_cosines_are_between_whole_moves() -> None:
    """Equal ways of unequal lengths give 1, opposite ones -1, and three clients the mean over their pairs."""
    strategy = load("fedavg")
    clients = [ClientInfo(client_id=i, rank=2) for i in range(3)]
    state = strategy.init(start(clients))
    sent = {c.client_id: strategy.broadcast(state, c, 1) for c in clients}
    one = train(sent[0], clients[0], 1)

    def times(factor: float, client: int) -> ClientUpdate:
        lora = {name: replace(f, B=factor * f.B) for name, f in one.adapter.lora.items()}
        return replace(one, client_id=client, adapter=replace(one.adapter, lora=lora))

    def cosine(updates: list[ClientUpdate]) -> float | None:
        return diagnose(state, strategy.aggregate(state, updates, 1), updates, sent).update_cosine

    assert cosine([one, times(3.0, 1)]) == pytest.approx(1.0)
    assert cosine([one, times(-0.5, 1)]) == pytest.approx(-1.0)
    assert cosine([one, times(3.0, 1), times(-0.5, 2)]) == pytest.approx(-1 / 3)
    assert cosine([one]) is None
    assert cosine([one, times(0.0, 1)]) is None


def test_a_client_that_stays_where_it_started_has_no_cosine() -> None:
    """After a round the start is no longer zero: its move is a difference that rounds to nothing."""
    before, after, updates, sent = play(load("fedavg"), 2)
    assert diagnose(before, after, updates, sent).update_cosine is not None
    idle = [replace(updates[0], adapter=sent[updates[0].client_id].adapter), *updates[1:]]
    got = diagnose(before, after, idle, sent)
    assert got.update_cosine is None
    assert got.drift is not None


def test_modules_that_a_client_lacks_are_no_part_of_its_move() -> None:
    strategy = load("flora")
    clients = [ClientInfo(client_id=i, rank=2) for i in range(3)]
    state = strategy.init(start(clients))
    sent = {c.client_id: strategy.broadcast(state, c, 1) for c in clients}
    updates = [train(sent[c.client_id], c, 1) for c in clients]
    last = sorted(SHAPES)[-1]
    part = {name: f for name, f in updates[1].adapter.lora.items() if name != last}
    updates[1] = replace(updates[1], adapter=replace(updates[1].adapter, lora=part))
    got = diagnose(state, strategy.aggregate(state, updates, 1), updates, sent)
    moves = [dense_deltas(u.adapter) for u in updates]
    assert got.update_cosine == pytest.approx(naive_cosine(moves), rel=1e-6)


def naive_cosine(moves: list[dict[str, torch.Tensor]]) -> float:
    """The mean over pairs of the cosine between all modules' entries, zeros where a client lacks one."""
    flat = [torch.cat([m.get(n, torch.zeros(s)).double().flatten() for n, s in sorted(SHAPES.items())]) for m in moves]
    pairs = [(j, k) for j in range(len(flat)) for k in range(j)]
    return sum(float(flat[j] @ flat[k] / flat[j].norm() / flat[k].norm()) for j, k in pairs) / len(pairs)
