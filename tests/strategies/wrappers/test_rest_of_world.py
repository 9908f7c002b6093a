"""Each client is sent its own parts and the mean of the others', against plain loops over clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.checks.clients import check_evaluation
from fedlora.strategies.configured import check_ranks, configured
from fedlora.strategies.wrappers.rest_of_world import RestOfWorld
from tests.naive.fedalt import mean_of_others

KEYS = {"strategy.name": "fedavg", "lora.kind": "fedalt", "lora.ranks": "", "lora.rank": 2}
SHAPES = {"m.fedalt_A": (2, 5), "m.fedalt_B": (6, 2), "m.fedalt_C": (2, 5), "m.fedalt_D": (6, 2), "m.fedalt_G": (2, 5)}
ROWS = {0: 7, 1: 2, 2: 11}
MEANS = {"m.fedalt_C": "m.fedalt_A", "m.fedalt_D": "m.fedalt_B"}


@pytest.fixture
def strategy() -> Strategy:
    made = configured(parse(KEYS))
    assert isinstance(made, RestOfWorld)
    return made


@pytest.fixture
def state(strategy: Strategy) -> ServerState:
    g = torch.Generator().manual_seed(9)
    start = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    start |= {"m.fedalt_A": torch.randn(2, 5, generator=g), "head": torch.zeros(3)}
    return strategy.init(AdapterState(tensors=start))


def sent_to(strategy: Strategy, state: ServerState, client: int) -> dict[str, Tensor]:
    info = ClientInfo(client_id=client, rank=2, num_examples=ROWS[client])
    return dict(strategy.broadcast(state, info, 1).adapter.tensors)


def replied(strategy: Strategy, state: ServerState, client: int, seed: int, size: float = 1.0) -> ClientUpdate:
    """What a client sends back of its message, with the parts that it trains drawn anew."""
    info = ClientInfo(client_id=client, rank=2, num_examples=ROWS[client])
    sent = strategy.broadcast(state, info, 1)
    g = torch.Generator().manual_seed(10 * seed + client)
    drawn = {name: size * torch.randn(t.shape, generator=g) for name, t in sent.adapter.tensors.items()}
    left = sent.plan.sent_back(AdapterState(tensors=drawn))
    assert set(left.tensors) == {"m.fedalt_A", "m.fedalt_B", "head"}
    return ClientUpdate(client, left, ROWS[client], start=sent.adapter)


def after(strategy: Strategy, state: ServerState, clients: list[int], seed: int) -> tuple[ServerState, dict[int, dict]]:
    replies = [replied(strategy, state, client, seed) for client in clients]
    return strategy.aggregate(state, iter(replies), seed), {r.client_id: dict(r.adapter.tensors) for r in replies}


def test_each_gets_its_own_and_the_mean_of_the_others_of_all_rounds(strategy: Strategy, state: ServerState) -> None:
    latest: dict[int, dict[str, Tensor]] = {}
    for number, clients in enumerate([[0, 1], [1, 2], [0], [0, 1, 2]], start=1):
        state, sent = after(strategy, state, clients, number)
        latest |= sent
        for client in ROWS:
            got = sent_to(strategy, state, client)
            for mean, part in MEANS.items():
                own = {each: parts[part] for each, parts in latest.items()}
                torch.testing.assert_close(got[mean], mean_of_others(client, own, ROWS))
                assert torch.equal(got[part], own.get(client, state.adapter.tensors[part]))
        heads = sum(ROWS[k] * sent[k]["head"] for k in clients) / sum(ROWS[k] for k in clients)
        torch.testing.assert_close(state.adapter.tensors["head"], heads)


def test_its_own_update_is_absent_from_what_a_client_gets(strategy: Strategy, state: ServerState) -> None:
    state, _ = after(strategy, state, [0, 1, 2], 1)
    found = []
    for size in (1.0, 1e4):
        replies = [replied(strategy, state, 0, 2, size), replied(strategy, state, 1, 2), replied(strategy, state, 2, 2)]
        found.append(strategy.aggregate(state, iter(replies), 2))
    mine, other = ([sent_to(strategy, each, client) for each in found] for client in (0, 1))
    for mean, part in MEANS.items():
        torch.testing.assert_close(mine[0][mean], mine[1][mean], rtol=0, atol=1e-7)
        assert not torch.allclose(other[0][mean], other[1][mean])
        assert not torch.equal(mine[0][part], mine[1][part])


def test_alone_a_client_gets_zeros(strategy: Strategy, state: ServerState) -> None:
    for number in (1, 2):
        state, _ = after(strategy, state, [1], number)
        got = sent_to(strategy, state, 1)
        assert not any(got[mean].any() for mean in MEANS)
        assert got["m.fedalt_B"].any()


def test_before_the_first_round_everybody_gets_the_start(strategy: Strategy, state: ServerState) -> None:
    for client in ROWS:
        got = sent_to(strategy, state, client)
        assert all(torch.equal(value, state.adapter.tensors[name]) for name, value in got.items())


def test_the_server_never_has_a_gate_and_its_own_parts_stay_the_start(strategy: Strategy, state: ServerState) -> None:
    later, _ = after(strategy, state, [0, 1, 2], 1)
    held = {name for kept in later.memory.values() for name in kept.tensors}
    assert held == {"m.fedalt_A", "m.fedalt_B", "clients"}
    for name in SHAPES:
        assert torch.equal(later.adapter.tensors[name], state.adapter.tensors[name])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "flora"}, "lora.kind = fedalt has no factors A and B"),
        ({"lora.ranks": "4,2"}, "needs one rank"),
        ({"strategy.robust": "median"}, "fedalt_G on the clients; set strategy.robust = none"),
        ({"strategy.restart-every": 1}, "fedalt_G on the clients; set strategy.restart-every = 0"),
        ({"train.layers-per-round": 1}, "lora.kind = fedalt has no factors A and B"),
        ({"strategy.correction": "feddyn"}, "lora.kind = fedalt has no factors A and B"),
        ({"evaluate.intruders": True}, "fedalt has no factors"),
    ],
)
def test_what_cannot_work_is_one_sentence(keys, says) -> None:
    with pytest.raises(StrategyError, match=says):
        check_ranks(parse({**KEYS, **keys}))


def test_clients_have_to_evaluate() -> None:
    config = parse(KEYS)
    with pytest.raises(StrategyError, match=r"lora\.kind = fedalt: fedalt_G stays on .* evaluate\.clients = true"):
        check_evaluation(config, configured(config))
