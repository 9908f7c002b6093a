"""Sampled layers: one draw for all clients, and what is not drawn stays to the bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fedlora.adapters.algebra import compress
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.wrappers.sampled_layers import SampledLayers, sampled
from tests.federation import run_locally, tiny
from tests.naive.clients import Run, dense_deltas, start, started, train

SHAPES = {f"model.layers.{n}.{m}": (9, 8) for n in range(12) for m in ("q", "v")} | {"lm_head": (7, 8)}
CLIENTS = [ClientInfo(client_id=i, rank=2, num_examples=i + 1) for i in range(3)]


def layers(modules: frozenset[str]) -> set[str]:
    return {module.split(".")[2] if "." in module else module for module in modules}


def test_whole_layers_are_drawn_alike_for_all_clients_and_anew_in_each_round():
    strategy = Run(SampledLayers(load("fedavg"), count=3), seed=5)
    state = strategy.init(start(CLIENTS, shapes=SHAPES))
    seen = []
    for number in range(1, 6):
        plans = [strategy.broadcast(state, client, number).plan for client in CLIENTS]
        assert plans[0] == plans[1] == plans[2]
        modules = plans[0].modules
        assert modules is not None
        assert len(layers(modules)) == 3
        assert modules == {module for module in SHAPES if layers(frozenset([module])) <= layers(modules)}
        seen.append(modules)
    assert len(set(seen)) > 3
    other = replace(state, seed=6)
    assert strategy.broadcast(other, CLIENTS[0], 1).plan.modules != seen[0]


def test_each_layer_is_visited_about_equally_often():
    """3 of 13 layers: over 1,300 rounds, each layer is drawn 300 times, give or take four standard deviations."""
    visits = Counter(layer for number in range(1300) for layer in layers(sampled(SHAPES, 3, 0, number)))
    assert len(visits) == 13
    assert all(abs(count - 300) < 4 * (1300 * 3 / 13 * 10 / 13) ** 0.5 for count in visits.values())
    assert sampled(["a.q", "a.1.q"], 9, 0, 1) == {"a.q", "a.1.q"}


@pytest.mark.parametrize(
    "name", ["fedavg", "fedavg-zeropad", "lora-fair", "flexlora", "fedex", "ffa", "hetlora", "rblora"]
)
def test_layers_that_are_not_drawn_stay_to_the_bit_and_are_not_sent(name):
    strategy = Run(SampledLayers(load(name), count=4), seed=1)
    state = started(strategy, strategy.init(start(CLIENTS, shapes=SHAPES)), CLIENTS)
    for number in (1, 2, 3):
        before, replies, modules = state, [], strategy.broadcast(state, CLIENTS[0], number).plan.modules
        for client in CLIENTS:
            sent = strategy.broadcast(state, client, number)
            assert {*sent.adapter.lora} == (modules or set()) | {n for n, f in state.adapter.lora.items() if f.B.any()}
            replies.append(replace(u := train(sent, client, number), adapter=sent.plan.sent_back(u.adapter)))
        assert modules is not None
        assert all({*reply.adapter.lora} == modules for reply in replies)
        state = strategy.aggregate(state, replies, number)
        for module, f in before.adapter.lora.items():
            after = state.adapter.lora[module]
            same = torch.equal(after.A, f.A) and torch.equal(after.B, f.B)
            assert same is (module not in modules)


def test_around_flora_at_rank_1_the_rank_is_at_most_the_number_of_visits():
    one = [ClientInfo(client_id=0, rank=1)]
    strategy = Run(SampledLayers(load("flora"), count=4), seed=2)
    state, visits = strategy.init(start(one, shapes=SHAPES)), Counter[str]()
    for number in range(1, 7):
        sent = strategy.broadcast(state, one[0], number)
        assert {*sent.adapter.lora} == sent.plan.modules  # the others have B = 0
        reply = train(sent, one[0], number)
        state = strategy.aggregate(state, [replace(reply, adapter=sent.plan.sent_back(reply.adapter))], number)
        visits.update(sent.plan.modules or ())
    made = strategy.global_adapter(state).lora
    dense = dense_deltas(strategy.global_adapter(state))
    for module in SHAPES:
        if visits[module]:
            assert compress({module: made[module]})[module].rank == min(visits[module], 7)
        else:
            assert not dense[module].any()


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ("fedavg", {"lora__ranks": "", "lora__rank": 2}),
        ("flora", {"lora__ranks": "", "lora__rank": 1, "model__quantization": "nf4", "train__clients_at_once": "auto"}),
        ("lora-fair", {"wire__upload_dtype": "int8", "strategy__server_optimizer": "momentum"}),
    ],
)
def test_a_run_uploads_the_drawn_layers_alone_and_learns(tmp_path, tiny_llama, strategy, keys):
    common = {"strategy__name": strategy, "train__lr": 2e-2, "train__steps": 6, "federation__rounds": 3, **keys}
    _, some = run_locally(tiny(tmp_path, tiny_llama, train__layers_per_round=1, **common))
    _, every = run_locally(tiny(tmp_path, tiny_llama, run__id="two", **common))
    ratios = [a["upload-bytes"] / b["upload-bytes"] for a, b in zip(some["rounds"], every["rounds"], strict=True)]
    assert all(0.4 < ratio < 0.8 for ratio in ratios)  # one of two layers, and the headers
    assert some["rounds"][-1]["heldout"]["loss"] < some["baseline"]["loss"]


def test_what_does_not_fit_is_refused_before_the_run(tmp_path, tiny_llama):
    with pytest.raises(StrategyError, match="RoLora trains A alone in round 2, where a layer that was never drawn"):
        check_ranks(tiny(tmp_path, tiny_llama, train__layers_per_round=1, strategy__name="rolora"))
    miss = {"lora__kind": "miss", "lora__ranks": "", "lora__rank": 2, "strategy__name": "fedavg"}
    with pytest.raises(StrategyError, match=r"lora\.kind = miss has no factors A and B"):
        check_ranks(tiny(tmp_path, tiny_llama, train__layers_per_round=1, **miss))
    with pytest.raises(StrategyError, match=r"train\.layers-per-round = 0, expected at least 1"):
        SampledLayers(load("fedavg"), count=0)
