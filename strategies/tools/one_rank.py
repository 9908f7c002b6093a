"""Plain means of factors, for methods that need one rank and one scaling on all clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import LoraFactors
from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from .replies import arrivals


class OneRank(Strategy):
    """A method that averages factors as they are, and so serves clients of one rank and one scaling.

    Attributes:
        method: the strategy's name, for messages.
    """

    method: ClassVar[str]
    unequal_ranks: ClassVar[bool] = False

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Check that all clients have the same ranks and scalings.

        Raises:
            StrategyError: they differ.
        """
        if len({client.all_ranks for client in clients}) > 1:
            ranks = [client.rank for client in clients]
            raise StrategyError(
                f"{self.method} averages factors and needs one rank, got ranks {_listed(ranks)}; {_one_rank(ranks)}",
                needs="unequal_ranks",
            )
        scalings = [_scalings(client) for client in clients]
        if len(set(scalings)) > 1:
            raise StrategyError(
                f"{self.method} averages factors and needs one scaling, got {_listed([s[0] for s in scalings])}; "
                "set one lora.alpha and lora.rslora for all clients",
                needs="unequal_ranks",
            )

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The server's factors, which are the same for all clients.

        Raises:
            StrategyError: the client's rank differs from the server's.
        """
        for name, factors in state.adapter.lora.items():
            _check_rank(name, f"client {client.client_id} has", client.rank_of(name), factors.rank, self.method)
        return super().broadcast(state, client, number)


def checked(
    updates: Iterable[ClientUpdate], number: int, held: Mapping[str, LoraFactors], method: str
) -> Iterator[ClientUpdate]:
    """The replies as they arrive, each with the ranks of the server and the scalings of the first reply.

    Args:
        updates: the replies.
        number: number of the round, for the message.
        held: the server's factors.
        method: name of the strategy, for the message.

    Raises:
        StrategyError: a rank or a scaling differs, or there is no reply.
    """
    expected: dict[str, tuple[int, float]] = {}
    for update in arrivals(updates, number):
        lora = update.adapter.lora
        sent = {name: (f.rank, f.scaling) for name, f in lora.items()}
        if sent != expected:
            for name, (rank, scaling) in sent.items():
                first = expected.setdefault(name, (held.get(name, lora[name]).rank, scaling))
                _check_rank(name, f"client {update.client_id} sent", rank, first[0], method)
                _check_scaling(name, update.client_id, scaling, first[1], method)
        yield update


def factor_means(updates: Iterable[ClientUpdate]) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    """The means of A and of B for each module, and those of the tensors trained in full.

    Args:
        updates: replies with the same ranks and scalings, which are read as they arrive.
    """
    means_a, means_b, dense = Means(), Means(), Means()
    scalings: dict[str, float] = {}
    for update in updates:
        lora = update.adapter.lora
        for name, f in lora.items():
            scalings.setdefault(name, f.scaling)
        means_a.add({name: f.A for name, f in lora.items()}, update.num_examples, update.client_id)
        means_b.add({name: f.B for name, f in lora.items()}, update.num_examples, update.client_id)
        dense.add(update.adapter.tensors, update.num_examples, update.client_id)
    means = {
        name: LoraFactors(A=a, B=means_b.values[name], scaling=scalings[name]) for name, a in means_a.values.items()
    }
    return means, dense.values


def _check_rank(module: str, who: str, got: int, expected: int, method: str) -> None:
    if got != expected:
        raise StrategyError(
            f"{module}: {who} rank {got}, but {method} on the server needs rank {expected}; {_one_rank([expected])}",
            needs="unequal_ranks",
        )


def _check_scaling(module: str, client_id: int, got: float, expected: float, method: str) -> None:
    if not math.isclose(got, expected, rel_tol=1e-6):
        raise StrategyError(
            f"{module}: client {client_id} sent scaling {got:g}, but {method} on the server needs {expected:g}; "
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
