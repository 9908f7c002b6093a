"""Faults of published implementations, over every strategy: one round against its dense twin.

1. A rank-1 client is broadcast over the others' rows. 2. One alpha over unequal ranks, and the effective scales
4, 2, 1 are ignored. 3. Every client gets the last client's rank (test_invariants). 4. The root of S is missing from
one factor. 5. Only the first client counts. 6. Updates of Conv1D layers are transposed (test_adapted). 7. Factors
are told apart by their shapes, which are alike where d = r. 8. Replies of earlier rounds count again
(test_invariants). 9. A is trained while B = 0 (test_ffa). 10. A client that skipped rounds trains on another base
(test_invariants).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.initializers.registry import asks_clients
from fedlora.strategies.registry import NAMES
from tests.naive import dense as naive
from tests.naive.clients import OWN_TWIN, SHAPES, asked, begin, dense_deltas, start, started, train, whole

WITH_TWIN = [n for n in NAMES if n not in OWN_TWIN and not load(n).personal and not load(n).starts_with]
UNEQUAL = [name for name in WITH_TWIN if load(name).unequal_ranks]


def one_round(
    name: str, clients: Sequence[ClientInfo], shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the strategy and its dense twin make of the same replies to round 1."""
    strategy = load(name)
    reference = importlib.import_module(f"tests.naive.{name.replace('-', '_')}")
    begun = start(clients, shapes=shapes)
    state = strategy.init(begun)
    twin = {n: reference.Module(f.A, f.B, f.scaling) for n, f in begun.lora.items()}
    updates: list[ClientUpdate] = []
    parts: dict[str, list[naive.Part]] = {n: [] for n in shapes}
    for client in clients:
        sent = strategy.broadcast(state, client, 1)
        reply = train(sent, client, seed=1)
        updates.append(reply)
        for n, f in whole(sent, reply).lora.items():
            twin[n].send(client.rank_of(n), client.scaling_of(n), state.adapter.lora[n].A)
            parts[n].append(naive.Part(f.A, f.B, f.scaling, client.num_examples))
    learned = dense_deltas(strategy.global_adapter(strategy.aggregate(state, updates, 1)))
    for n, replies in parts.items():
        twin[n].aggregate(replies)
    return learned, {n: twin[n].total() for n in sorted(shapes)}


def assert_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, matrix in expected.items():
        assert float((got[name] - matrix).norm()) < 1e-5 * (1 + float(matrix.norm())), name


@pytest.mark.parametrize("name", UNEQUAL)
def test_fault_1_a_rank_1_client_is_not_broadcast(name: str) -> None:
    assert_near(*one_round(name, [ClientInfo(client_id=i, rank=r) for i, r in enumerate((3, 1, 1))]))


@pytest.mark.parametrize("name", UNEQUAL)
def test_fault_2_effective_scales_count(name: str) -> None:
    """alpha = 4 over ranks 1, 2, 4 makes scales 4, 2, 1."""
    assert_near(*one_round(name, [ClientInfo(client_id=i, rank=r, alpha=4.0) for i, r in enumerate((1, 2, 4))]))


@pytest.mark.parametrize("name", UNEQUAL)
def test_fault_4_the_next_start_multiplies_to_what_was_made(name: str) -> None:
    """Folds and the largest client's own factors are the global model, at its scaling and with both roots of S."""
    strategy = load(name)
    clients = [ClientInfo(client_id=i, rank=r, alpha=7.0) for i, r in enumerate((4, 2))]
    state = strategy.init(start(clients))
    updates = [train(strategy.broadcast(state, c, 1), c, seed=2) for c in clients]
    state = strategy.aggregate(state, updates, 1)
    sent = strategy.broadcast(state, clients[0], 2)
    adapter, folds = dense_deltas(sent.adapter), dense_deltas(state.folds.total())
    assert_near(
        {n: adapter[n] + folds.get(n, torch.zeros(())) for n in adapter}, dense_deltas(strategy.global_adapter(state))
    )


@pytest.mark.parametrize("name", NAMES)
def test_fault_5_every_client_counts(name: str) -> None:
    strategy = load(name)
    clients = [ClientInfo(client_id=i, rank=3) for i in range(4)]
    state, zero = strategy.init(start(clients)), asks_clients(strategy)
    if not zero:
        state = started(strategy, state, clients)
    sent = asked(strategy, state, clients[0]) if zero else strategy.broadcast(state, clients[0], 1)
    updates = [train(sent, c, seed=3) for c in clients]

    def learned(replies: Sequence[ClientUpdate]) -> Tensor:
        new = begin(strategy, state, replies) if zero else strategy.aggregate(state, replies, 1)
        made = new.adapter.lora["layers.0.q"].A if strategy.personal else None
        return made if made is not None else dense_deltas(strategy.global_adapter(new))["layers.0.q"]

    everyone = learned(updates)
    for k, update in enumerate(updates):
        moved = {n: LoraFactors(1.5 * f.A, 1.5 * f.B, f.scaling) for n, f in update.adapter.lora.items()}
        changed = replace(update, adapter=AdapterState(lora=moved, tensors=update.adapter.tensors))
        assert float((learned([*updates[:k], changed, *updates[k + 1 :]]) - everyone).norm()) > 1e-2 * float(
            everyone.norm()
        )


@pytest.mark.parametrize("name", WITH_TWIN)
def test_fault_7_square_factors(name: str) -> None:
    """d_out = d_in = r: nothing may be told from shapes."""
    assert_near(*one_round(name, [ClientInfo(client_id=i, rank=4) for i in range(3)], {"a": (4, 4), "b": (4, 4)}))
