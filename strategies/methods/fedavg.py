"""FedAvg over the factors, as in FedIT: the mean of the A and the mean of the B, for clients of one rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import LoraFactors
from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import arrivals


@dataclass(frozen=True)
class FedAvg(Strategy):
    """`A = sum_k p_k A_k`, `B = sum_k p_k B_k`, with p_k = n_k / sum(n).

    Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT),
    https://arxiv.org/abs/2305.05644, Algorithm 1. The product of the means is not the mean of the products: it
    lacks `sum_k p_k s (B_k - B)(A_k - A)`.
    Memory: one reply, since each is added to the means when it arrives.
    """

    linear: ClassVar[bool] = True
    unequal_ranks: ClassVar[bool] = False
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Check that all clients have the same ranks and scalings.

        Raises:
            StrategyError: they differ.
        """
        if len({client.all_ranks for client in clients}) > 1:
            ranks = [client.rank for client in clients]
            raise StrategyError(
                f"fedavg averages factors and needs one rank, got ranks {_listed(ranks)}; {_one_rank(ranks)}",
                needs="unequal_ranks",
            )
        scalings = [_scalings(client) for client in clients]
        if len(set(scalings)) > 1:
            raise StrategyError(
                f"fedavg averages factors and needs one scaling, got {_listed([s[0] for s in scalings])}; "
                "set one lora.alpha and lora.rslora for all clients",
                needs="unequal_ranks",
            )

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The mean factors, which are the same for all clients.

        Raises:
            StrategyError: the client's rank differs from the server's.
        """
        for name, factors in state.adapter.lora.items():
            _check_rank(name, client.client_id, client.rank_of(name), factors.rank, "has")
        return super().broadcast(state, client, number)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of A and of B. A module or tensor that no reply contains keeps its value.

        Raises:
            StrategyError: a reply's rank differs from the server's, or its scaling from that of the first reply.
        """
        means_a, means_b, dense = Means(), Means(), Means()
        expected: dict[str, tuple[int, float]] = {}
        for update in arrivals(updates, number):
            lora = update.adapter.lora
            sent = {name: (f.rank, f.scaling) for name, f in lora.items()}
            if sent != expected:
                for name, (rank, scaling) in sent.items():
                    held = state.adapter.lora.get(name, lora[name])
                    first = expected.setdefault(name, (held.rank, scaling))
                    _check_rank(name, update.client_id, rank, first[0], "sent")
                    _check_scaling(name, update.client_id, scaling, first[1])
            means_a.add({name: f.A for name, f in lora.items()}, update.num_examples, update.client_id)
            means_b.add({name: f.B for name, f in lora.items()}, update.num_examples, update.client_id)
            dense.add(update.adapter.tensors, update.num_examples, update.client_id)
        lora = {
            name: LoraFactors(A=a, B=means_b.values[name], scaling=expected[name][1])
            for name, a in means_a.values.items()
        }
        return state.updated(lora, dense.values)


def _check_rank(module: str, client_id: int, got: int, expected: int, verb: str) -> None:
    if got != expected:
        raise StrategyError(
            f"{module}: client {client_id} {verb} rank {got}, but fedavg on the server needs rank {expected}; "
            f"{_one_rank([expected])}",
            needs="unequal_ranks",
        )


def _check_scaling(module: str, client_id: int, got: float, expected: float) -> None:
    if not math.isclose(got, expected, rel_tol=1e-6):
        raise StrategyError(
            f"{module}: client {client_id} sent scaling {got:g}, but fedavg on the server needs {expected:g}; "
            "set one lora.alpha and lora.rslora for all clients",
            needs="unequal_ranks",
        )


def _scalings(client: ClientInfo) -> tuple[float, ...]:
    """This client's scaling at each rank that its modules have."""
    ranks = (client.rank, *client.rank_pattern.values())
    return tuple(replace(client, rank=rank, rank_pattern={}).scaling_of("") for rank in ranks)


def _one_rank(ranks: Sequence[int]) -> str:
    return f"set lora.ranks = '' and lora.rank = {max(ranks)}"


def _listed(values: Sequence[float], most: int = 10) -> str:
    return ", ".join(f"{value:g}" for value in values[:most]) + (", …" if len(values) > most else "")
