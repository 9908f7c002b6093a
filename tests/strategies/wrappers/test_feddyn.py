"""FedDyn on quadratic losses whose common optimum is known, and in runs that stop and go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.training import terms
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.models.trainable import Pair
from fedlora.strategies.base import Strategy
from fedlora.strategies.configured import check_ranks, configured
from fedlora.strategies.methods.fedsb import FedSb
from fedlora.strategies.methods.ffa import Ffa
from fedlora.strategies.wrappers.feddyn import FedDyn
from tests.naive.quadratics import optimum, quadratics

from .corrected import check_runs

ALPHA = 1.0
CLIENTS = [ClientInfo(client_id=i, rank=2, num_examples=5) for i in range(3)]


def distance(strategy: Strategy, rounds: int, chosen: Any = lambda number: (0, 1, 2)) -> float:
    """How far B is from the optimum of the sum of all losses, after clients that minimise their own in each round."""
    start, hessians, centres = quadratics()
    best, state = optimum(hessians, centres), strategy.init(start)
    kept: list[AdapterState | None] = [None] * 3
    for number in range(1, rounds + 1):
        replies: list[ClientUpdate] = []
        for k in chosen(number):
            sent = strategy.broadcast(state, CLIENTS[k], number)
            f = sent.adapter.lora["m"]
            pair = Pair("m", torch.nn.Parameter(f.A, requires_grad=False), torch.nn.Parameter(f.B.clone()), f.scaling)
            add = terms.penalty([pair], sent.plan, kept[k])
            weight = ALPHA * bool(sent.plan.terms)  # the term's gradient is weight x and something constant
            with torch.no_grad():
                pair.B.zero_()
            pair.B.grad = torch.zeros(4, 2).double()
            add()
            known = hessians[k] @ centres[k] - pair.B.grad.flatten()
            with torch.no_grad():
                pair.B.copy_(torch.linalg.solve(hessians[k] + weight * torch.eye(8), known).reshape(4, 2))
            pair.B.grad = (hessians[k] @ (pair.B.detach().flatten() - centres[k])).reshape(4, 2)
            add()
            assert pair.B.grad is not None
            assert float(pair.B.grad.norm()) < 1e-8  # the end of a long training
            end = AdapterState(lora={"m": replace(f, B=pair.B.detach())})
            kept[k] = terms.kept_after(kept[k], sent.adapter, end, sent.plan)
            replies.append(ClientUpdate(k, AdapterState(lora={"m": replace(end.lora["m"], A=torch.empty(0, 0))}), 5))
        state = strategy.aggregate(state, iter(replies), number)
    return float((state.adapter.lora["m"].B.flatten() - best).norm() / best.norm())


def test_it_reaches_the_optimum_of_all_clients_where_plain_means_stop_elsewhere() -> None:
    corrected = FedDyn(Ffa(), alpha=ALPHA, clients=3)
    assert distance(corrected, 150) < 1e-4
    assert distance(Ffa(), 150) > 0.2
    assert distance(corrected, 5) > 1e-4  # it takes rounds


def test_so_it_does_with_two_of_three_clients_in_each_round() -> None:
    drawn = lambda number: [(0, 1), (1, 2), (2, 0)][number % 3]  # noqa: E731
    assert distance(FedDyn(Ffa(), alpha=ALPHA, clients=3), 400, drawn) < 1e-3


def test_a_core_has_its_term_too() -> None:
    g = torch.Generator().manual_seed(0)
    A, B, R, kept, left = (torch.randn(shape, generator=g) for shape in ((2, 5), (4, 2), (2, 2), (2, 2), (2, 2)))
    frozen = [torch.nn.Parameter(factor, requires_grad=False) for factor in (A, B)]
    pair = Pair("m", *frozen, 1.0, torch.nn.Parameter(R.clone()))
    assert pair.core is not None
    empty = torch.empty(0, 0)
    plan = FedDyn(FedSb(), alpha=0.3).broadcast(FedSb().init(AdapterState()), CLIENTS[0], 1).plan
    own = AdapterState(lora={"m": LoraFactors(empty, empty, 1.0, kept)})
    add = terms.penalty([pair], plan, own)
    with torch.no_grad():
        pair.core.add_(left)
    pair.core.grad = torch.zeros(2, 2)
    add()
    torch.testing.assert_close(pair.core.grad, 0.3 * left - kept)
    start = AdapterState(lora={"m": LoraFactors(A, B, 1.0, R)})
    end = AdapterState(lora={"m": LoraFactors(A, B, 1.0, R + left)})
    after = terms.kept_after(own, start, end, plan)
    assert after is not None
    torch.testing.assert_close(after.lora["m"].R, kept - 0.3 * left)


@pytest.mark.parametrize("name", ["ffa", "fedsb"])
def test_a_run_and_its_resumed_twin_and_cohorts_agree(tmp_path, tiny_llama, name) -> None:
    keys = {"strategy__name": name, "lora__ranks": "", "lora__rank": 2, "strategy__correction": "feddyn"}
    training = {"strategy__correction_weight": 0.5, "train__steps": 4, "train__lr": 0.05}
    check_runs(tmp_path, tiny_llama, 3, **keys, **training)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "fedavg"}, "FedAvg trains several factors"),
        ({"strategy.name": "rolora"}, "RoLora trains several factors, or other ones"),
        ({"strategy.name": "fedsvd"}, "FedSvd trains several factors, or other ones, or changes their basis"),
        ({"strategy.name": "ffa", "lora.ranks": "4,2,2,2"}, "feddyn needs one rank for all clients"),
        ({"strategy.name": "ffa", "strategy.restart-every": 1}, "which strategy.restart-every changes again"),
        ({"strategy.name": "ffa", "strategy.server-optimizer": "adam"}, "which strategy.server-optimizer changes"),
        ({"strategy.name": "ffa", "lora.kind": "miss"}, "lora.kind = miss has no factors"),
        ({"strategy.name": "ffa", "strategy.robust": "median"}, "median makes one reply of all"),
        ({"strategy.name": "ffa", "strategy.robust": "trimmed-mean"}, "trimmed-mean makes one reply of all"),
    ],
)
def test_what_cannot_work_is_one_sentence(keys, says) -> None:
    given = {"strategy.correction": "feddyn", "lora.ranks": "", "lora.rank": 2, "federation.clients": 4, **keys}
    with pytest.raises(StrategyError, match=says):
        check_ranks(parse(given))


def test_the_config_makes_it() -> None:
    keys = {"strategy.name": "ffa", "strategy.correction": "feddyn", "strategy.correction-weight": 0.1}
    assert configured(parse({**keys, "federation.clients": 7})) == FedDyn(Ffa(), alpha=0.1, clients=7)
