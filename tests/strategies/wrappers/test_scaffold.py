"""SCAFFOLD on quadratic losses whose common optimum is known, against plain loops, and in runs that stop and go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.state import EMPTY
from fedlora.clients.node import own_state
from fedlora.clients.training import terms
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, wire
from fedlora.models.trainable import Pair
from fedlora.strategies.base import Strategy
from fedlora.strategies.configured import check_ranks, configured
from fedlora.strategies.methods.fedsb import FedSb
from fedlora.strategies.methods.ffa import Ffa
from fedlora.strategies.wrappers.scaffold import Scaffold
from tests.naive.quadratics import optimum, quadratics
from tests.naive.scaffold import scaffold

from .corrected import check_runs

RATES = (0.1, 0.08, 0.05, 0.1, 0.02, 0.1, 0.1, 0.1)
EVERYONE = (0, 1, 2)


def played(
    strategy: Strategy,
    chosen: Sequence[Sequence[int]],
    rows: Sequence[int] = (5, 5, 5),
    lost: Sequence[tuple[int, int]] = (),
) -> list[Tensor]:
    """x after each round of clients that make SGD's steps in what they are sent over the wire."""
    start, hessians, centres = quadratics()
    clients = [ClientInfo(client_id=k, rank=2, num_examples=n) for k, n in enumerate(rows)]
    state, found = strategy.init(start), list[Tensor]()
    disks: list[dict[int, AdapterState]] = [{} for _ in clients]
    for number, asked in enumerate(chosen, start=1):
        replies: list[ClientUpdate] = []
        for k in asked:
            sent = strategy.broadcast(state, clients[k], number)
            begun = max((each for each in disks[k] if each <= sent.counted), default=0)
            kept = terms.kept_before(disks[k].get(begun), sent.control, sent.plan)
            f = sent.adapter.lora["m"]
            pair = Pair("m", torch.nn.Parameter(f.A, requires_grad=False), torch.nn.Parameter(f.B.clone()), f.scaling)
            add = terms.penalty([pair], sent.plan, kept)
            for rate in RATES:
                pair.B.grad = (hessians[k] @ (pair.B.detach().flatten() - centres[k])).reshape(4, 2)
                add()
                assert pair.B.grad is not None
                with torch.no_grad():
                    pair.B.sub_(pair.B.grad, alpha=rate)
            end = AdapterState(lora={"m": replace(f, B=pair.B.detach())})
            after = terms.kept_after(kept, sent.adapter, end, sent.plan, sum(RATES))
            if after is not None:
                disks[k][number] = after
            if (number, k) not in lost:
                reply = AdapterState(lora={"m": replace(end.lora["m"], A=EMPTY)})
                metrics = {"train-rate": sum(RATES)}
                replies.append(ClientUpdate(k, reply, rows[k], metrics=metrics, start=sent.adapter))
        state = strategy.aggregate(state, iter(replies), number)
        found.append(state.adapter.lora["m"].B.flatten())
    return found


def away(x: Tensor, rows: Sequence[int] = (1, 1, 1)) -> float:
    _, hessians, centres = quadratics()
    best = optimum(hessians, centres, rows)
    return float((x - best).norm() / best.norm())


@pytest.mark.parametrize(
    ("rows", "chosen", "lost"),
    [
        ((5, 5, 5), [EVERYONE] * 6, ()),
        ((2, 5, 9), [EVERYONE, (0, 1), (2,), (1, 2), (0,), EVERYONE], ()),
        ((5, 5, 5), [(0, 1), (1, 2), (0, 2), (1,), EVERYONE], ()),
        ((2, 5, 9), [EVERYONE, (0, 1), EVERYONE, EVERYONE, EVERYONE], ((2, 1), (3, 1), (3, 0))),
    ],
    ids=["all", "unequal rows", "two of three", "lost replies"],
)
def test_it_is_the_algorithm_in_plain_loops(rows, chosen, lost) -> None:
    _, hessians, centres = quadratics()
    expected = scaffold(hessians, centres, rows, RATES, chosen, lost)
    for got, x in zip(played(Scaffold(Ffa(), clients=3), chosen, rows, lost), expected, strict=True):
        torch.testing.assert_close(got, x)


@pytest.mark.parametrize("rows", [(5, 5, 5), (2, 5, 9)])
def test_it_reaches_the_optimum_of_all_rows_where_plain_means_stop_elsewhere(rows) -> None:
    corrected, plain = (played(s, [EVERYONE] * 400, rows) for s in (Scaffold(Ffa(), clients=3), Ffa()))
    assert away(corrected[-1], rows) < 1e-6
    assert away(plain[-1], rows) > 0.02
    assert away(corrected[4], rows) > 1e-3  # it takes rounds


def test_so_it_does_with_two_of_three_clients_in_a_round_and_replies_that_are_lost() -> None:
    chosen = [[(0, 1), (1, 2), (2, 0)][number % 3] for number in range(900)]
    lost = [(number, chosen[number - 1][0]) for number in range(2, 200, 5)]
    strategy = Scaffold(Ffa(), clients=3)
    assert away(played(strategy, chosen, (2, 5, 9), lost)[-1], (2, 5, 9)) < 1e-4
    assert away(played(Ffa(), chosen, (2, 5, 9), lost)[-1], (2, 5, 9)) > 0.02


def test_the_first_round_is_that_of_plain_means() -> None:
    (corrected,), (plain,) = (played(s, [EVERYONE], (2, 5, 9)) for s in (Scaffold(Ffa(), clients=3), Ffa()))
    assert torch.equal(corrected, plain)


def test_a_core_has_its_variates_too() -> None:
    g = torch.Generator().manual_seed(0)
    A, B, R, own, left = (torch.randn(shape, generator=g) for shape in ((2, 5), (4, 2), (2, 2), (2, 2), (2, 2)))
    c = torch.randn(2, 2, generator=g)
    state = FedSb().init(AdapterState(lora={"m": LoraFactors(A, B, 2.0, R)}))
    strategy = Scaffold(FedSb(), clients=1)
    sent = strategy.broadcast(state, ClientInfo(client_id=0, rank=2), 1)
    assert sent.control is None
    start = sent.adapter
    end = AdapterState(lora={"m": replace(start.lora["m"], R=R + left)})
    reply = AdapterState(lora={"m": replace(end.lora["m"], A=EMPTY, B=EMPTY)})
    update = ClientUpdate(0, reply, 3, metrics={"train-rate": 0.5}, start=start)
    sent = strategy.broadcast(strategy.aggregate(state, iter([update]), 1), ClientInfo(client_id=0, rank=2), 2)
    assert sent.control is not None
    torch.testing.assert_close(sent.control.lora["m"].R, -left / 0.5)
    assert sent.counted == 1
    control, mine = (AdapterState(lora={"m": LoraFactors(EMPTY, EMPTY, 2.0, each)}) for each in (c, own))
    kept = terms.kept_before(mine, control, sent.plan)
    assert kept is not None
    pair = Pair("m", *(torch.nn.Parameter(f, requires_grad=False) for f in (A, B)), 2.0, torch.nn.Parameter(R.clone()))
    assert pair.core is not None
    pair.core.grad = torch.zeros(2, 2)
    terms.penalty([pair], sent.plan, kept)()
    torch.testing.assert_close(pair.core.grad, c - own)
    after = terms.kept_after(kept, start, end, sent.plan, 0.5)
    assert after is not None
    torch.testing.assert_close(after.lora["m"].R, own - c - left / 0.5)


def test_c_goes_over_the_wire_in_the_shapes_of_what_is_trained() -> None:
    start, _, _ = quadratics()
    small = AdapterState(lora={"m": LoraFactors(*(t.float() for t in (start.lora["m"].A, start.lora["m"].B)), 1.0)})
    control = AdapterState(lora={"m": LoraFactors(EMPTY, torch.randn(4, 2), 1.0)})
    plan = Scaffold(Ffa()).broadcast(Ffa().init(small), ClientInfo(client_id=0, rank=2), 1).plan
    sent = Broadcast(round=4, adapter=small, plan=plan, control=control, counted=3)
    got = wire.decode_broadcast(wire.encode_broadcast(sent, "base"), "base")
    assert got.control is not None
    assert torch.equal(got.control.lora["m"].B, control.lora["m"].B)
    assert got.counted == 3
    wrong = AdapterState(lora={"m": LoraFactors(EMPTY, torch.randn(4, 3), 1.0)})
    with pytest.raises(wire.WireError, match="m"):
        wire.decode_broadcast(wire.encode_broadcast(replace(sent, control=wrong), "base"), "base")


def test_a_client_keeps_the_variate_that_the_server_counted(tmp_path) -> None:
    for number in range(1, 7):
        state = AdapterState(lora={"m": LoraFactors(EMPTY, torch.full((1, 1), float(number)), 1.0)})
        own_state.save(tmp_path, "control", state, number, keep=2, since=2)
    kept = own_state.load(tmp_path, "control", 2 + 1)
    assert kept is not None
    assert float(kept.lora["m"].B) == 2.0
    assert own_state.load(tmp_path, "control", 2) is None  # what nobody needs any more is removed


@pytest.mark.parametrize("name", ["ffa", "fedsb"])
def test_a_run_and_its_resumed_twin_and_cohorts_agree(tmp_path, tiny_llama, name) -> None:
    keys = {"strategy__name": name, "lora__ranks": "", "lora__rank": 2, "strategy__correction": "scaffold"}
    training = {"train__optimizer": "sgd", "train__steps": 4, "train__lr": 1.0, "federation__fraction": 0.75}
    losses, ends = check_runs(tmp_path, tiny_llama, 4, **keys, **training)
    assert losses["1"][0] == losses["plain"][0]
    down = [entry["download-bytes"] for entry in ends["1"]["rounds"] if entry["round"]]
    assert down[1] > down[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "fedavg"}, "scaffold adds up gradients .* FedAvg trains several factors"),
        ({"strategy.name": "fedsvd"}, "FedSvd trains several factors, or other ones, or changes their basis"),
        ({"lora.ranks": "4,2,2,2"}, "scaffold needs one rank for all clients"),
        ({"strategy.restart-every": 1}, "which strategy.restart-every changes again"),
        ({"train.optimizer": "adamw"}, "so for plain SGD alone, and train.optimizer = adamw"),
        ({"strategy.robust": "median"}, "strategy.robust = median takes some of it away"),
        ({"wire.dtype": "bf16"}, "wire.dtype = bf16 rounds it"),
    ],
)
def test_what_cannot_work_is_one_sentence(keys, says) -> None:
    given = {"strategy.name": "ffa", "strategy.correction": "scaffold", "train.optimizer": "sgd", "lora.ranks": ""}
    with pytest.raises(StrategyError, match=says):
        check_ranks(parse({**given, "lora.rank": 2, "federation.clients": 4, **keys}))


def test_the_config_makes_it() -> None:
    keys = {"strategy.name": "ffa", "strategy.correction": "scaffold", "train.optimizer": "sgd"}
    assert configured(parse({**keys, "federation.clients": 7})) == Scaffold(Ffa(), clients=7)
