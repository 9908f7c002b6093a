"""FLASC against plain loops, fedavg, and its own count of entries and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate, wire
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.flasc import Flasc
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.federation import run_locally, tiny
from tests.naive import dense as naive
from tests.naive.clients import start, train
from tests.naive.flasc import Module
from tests.strategies.test_invariants import assert_same

CLIENTS = [ClientInfo(client_id=i, rank=3, num_examples=n) for i, n in enumerate((5, 1, 9))]


def one_round(
    strategy: Strategy, state: ServerState, number: int, clients: Sequence[ClientInfo] = CLIENTS, size: float = 0.3
) -> tuple[ServerState, list[ClientUpdate]]:
    sent = [train(strategy.broadcast(state, client, number), client, number, size) for client in clients]
    return strategy.aggregate(state, iter(sent), number), sent


def test_with_density_1_it_is_fedavg_and_fedadam_bitwise() -> None:
    pairs = [
        (Flasc(density=1.0), FedAvg()),
        (ServerOptimizer(Flasc(density=1.0), kind="adam"), ServerOptimizer(FedAvg(), kind="adam")),
    ]
    for mine, other in pairs:
        states = [strategy.init(start(CLIENTS)) for strategy in (mine, other)]
        for number in (1, 2, 3):
            states = [one_round(s, state, number)[0] for s, state in zip((mine, other), states, strict=True)]
            assert_same(states[0].adapter, states[1].adapter)


def test_equals_plain_loops_over_three_rounds_with_unequal_densities() -> None:
    strategy, shares = Flasc(tiers="0.2/0.5/1"), (0.2, 0.5, 1.0)
    state = strategy.init(start(CLIENTS, shapes={"m": (6, 9)}))
    first = state.adapter.lora["m"]
    twin = Module(first.A, first.B, first.scaling)
    for number in (1, 2, 3):
        before = state
        state, replies = one_round(strategy, state, number)
        parts: list[naive.Part] = []
        for client, share, reply in zip(CLIENTS, shares, replies, strict=True):
            A, B = twin.send(share)
            got = strategy.broadcast(before, client, number).adapter.lora["m"]
            torch.testing.assert_close(got.A.double(), A, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got.B.double(), B, rtol=1e-5, atol=1e-6)
            trained = reply.adapter.lora["m"]
            parts.append(naive.Part(trained.A.double(), trained.B.double(), trained.scaling, client.num_examples))
        twin.aggregate(parts)
        torch.testing.assert_close(state.adapter.lora["m"].A.double(), twin.A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.adapter.lora["m"].B.double(), twin.B, rtol=1e-5, atol=1e-6)


def test_what_a_client_is_not_sent_and_nobody_trains_stays_on_the_server() -> None:
    strategy = Flasc(density=0.1)
    state = one_round(Flasc(density=1.0), strategy.init(start(CLIENTS)), 1)[0]
    after, _ = one_round(strategy, state, 2, size=0.0)
    for name, factors in after.adapter.lora.items():
        torch.testing.assert_close(factors.A, state.adapter.lora[name].A)
        torch.testing.assert_close(factors.B, state.adapter.lora[name].B)


def test_the_message_is_as_small_as_its_density_and_arrives_unchanged() -> None:
    clients = [ClientInfo(client_id=0, rank=8)]
    shapes = {"a": (400, 300), "b": (300, 500)}
    state = one_round(FedAvg(), FedAvg().init(start(clients, shapes=shapes)), 1, clients)[0]
    whole = wire.payload_bytes(wire.encode_broadcast(FedAvg().broadcast(state, clients[0], 2), "base"))
    for density in (0.5, 0.25, 1 / 64):
        sent = Flasc(density=density).broadcast(state, clients[0], 2)
        tensors = OWN.put(AdapterState(lora=sent.adapter.lora)).values()
        total = sum(tensor.numel() for tensor in tensors)
        assert sum(int(tensor.count_nonzero()) for tensor in tensors) == math.ceil(density * total)
        record = wire.encode_broadcast(sent, "base", "bf16")  # sparse tensors are in fp32 all the same
        assert wire.payload_bytes(record) < 1.3 * density * whole + 1500
        got = wire.decode_broadcast(record, "base").adapter
        assert_same(got, wire.as_received(sent, "bf16").adapter)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"tiers": "0.5/2"}, {"tiers": "a/b"}])
def test_a_density_out_of_range_is_named(options) -> None:
    with pytest.raises(StrategyError, match=r"flasc's densities .* expected numbers above 0 and at most 1"):
        Flasc(**options)


def test_sparse_both_ways_with_adam_learns(tmp_path, tiny_llama) -> None:
    keys = {"lora__ranks": "", "lora__rank": 4, "train__steps": 6, "federation__rounds": 3}
    ends: dict[str, dict] = {}
    for name, more in (
        ("dense", {"strategy__name": "fedavg"}),
        (
            "sparse",
            {"strategy__name": "flasc", "wire__upload_dtype": "sparse", "strategy__options": "density=0.25"},
        ),
    ):
        server = {"strategy__server_optimizer": "adam", "strategy__server_lr": 0.01}
        _, ends[name] = run_locally(tiny(tmp_path, tiny_llama, run__name=name, **keys, **more, **server))
    losses = {name: [entry["heldout"]["loss"] for entry in result["rounds"]] for name, result in ends.items()}
    assert losses["sparse"][-1] < ends["sparse"]["baseline"]["loss"]
    for what in ("upload-bytes", "download-bytes"):
        assert ends["sparse"]["rounds"][1][what] < 0.75 * ends["dense"]["rounds"][1][what]  # headers are much of it
    assert 0 < ends["sparse"]["rounds"][0]["codec-error"] < 1


def test_robust_rules_do_not_compare_clients_of_different_densities() -> None:
    """What a client is not sent is missing from what it ends with, so that a median would take it for a change."""
    tiers, one = Flasc(tiers="0.2/1"), Flasc(tiers="0.2/0.2")
    for rule in ("median", "trimmed-mean", "krum", "multi-krum"):
        assert Robust(one, rule=rule).one_start
        with pytest.raises(StrategyError, match=f"{rule} compares what clients end with, .* Flasc has them start from"):
            Robust(ServerOptimizer(tiers), rule=rule)
    state = one_round(tiers, tiers.init(start(CLIENTS)), 1)[0]
    assert_same(
        one_round(Robust(tiers), state, 2, size=0.0)[0].adapter, one_round(tiers, state, 2, size=0.0)[0].adapter
    )
