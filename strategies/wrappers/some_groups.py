"""Some groups: a client of a smaller rank trains some of the groups of parts that its adapter kind has."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import AdapterKind, Place
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState
from .wrapper import Wrapper


@dataclass(frozen=True)
class SomeGroups(Wrapper):
    """Client k of rank r_k trains `h r_k / r` of h groups, such as RAVAN's heads; r is the largest rank.

    All groups are sent, and are in the client's forward pass. Those that it does not train are frozen there, and it
    does not send them back. The inner strategy averages each tensor over the clients that sent it. At equal ranks,
    everything is as without this wrapper. `lora.kind` asks for it.

    Which groups a client trains in a round is the same in all modules. By the run's seed, each client has an order of
    its own, and goes round it: a client of half the rank trains one half of the groups in odd rounds, and the other one
    in even rounds. Over the rounds, it trains all groups equally often.

    Args:
        inner: a strategy for every adapter kind, which leaves tensors that no reply contains as they are.
        kind: the run's kind, with `groups`.
    """

    kind: AdapterKind

    @property
    def unequal_ranks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def own_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """The check of the inner strategy, of clients that all have the largest rank.

        Raises:
            StrategyError: the inner strategy refuses them, or a client's rank is no whole number of groups.
        """
        most = max(client.rank for client in clients)
        for client in clients:
            self._count(client, client.rank, most)
        unequal = len({client.all_ranks for client in clients}) > 1
        if unequal and any(client.rank_pattern or client.ranks for client in clients):
            raise StrategyError(
                f"{self.kind.name}: clients of ranks {_listed(clients)} train the same groups in all modules, which "
                "lora.rank-pattern or lora.allocation gives ranks of their own; leave these out, or set one rank by "
                "lora.ranks = ''"
            )
        super().check([replace(client, rank=most) for client in clients])

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with a plan that freezes the groups that the client does not train.

        Raises:
            StrategyError: the client's rank is larger than the server's, or no whole number of groups.
        """
        sent = self.inner.broadcast(state, client, number)
        counts = {self._count(client, client.rank_of(m), rank) for m, rank in self._ranks(state.adapter).items()}
        if len(counts) > 1:
            raise StrategyError(
                f"client {client.client_id} would train {min(counts)} of {len(self.kind.groups)} groups of "
                f"{self.kind.name} in some modules and {max(counts)} in others; leave out lora.rank-pattern and "
                "lora.allocation, or set one rank by lora.ranks = ''"
            )
        every = len(self.kind.groups)
        own = chosen(state.seed, number, client.client_id, (every, min(counts, default=every)))
        frozen = {f"{self.kind.name}_{part}" for group in {*range(every)} - {*own} for part in self.kind.groups[group]}
        return replace(sent, plan=replace(sent.plan, frozen=sent.plan.frozen | frozen))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """As the inner strategy."""
        return self.inner.aggregate(state, updates, number)

    def _ranks(self, adapter: AdapterState) -> dict[str, int]:
        """Module -> its rank on the server."""
        ends = {f".{self.kind.name}_{part}" for part in self.kind.groups[0]}
        modules = {name.removesuffix(end) for name in adapter.tensors for end in ends if name.endswith(end)}
        return {
            module: self.kind.rank(self.kind.parts_of(adapter.tensors, Place(module, 1, 1, rank=1)))
            for module in sorted(modules)
        }

    def _count(self, client: ClientInfo, rank: int, most: int) -> int:
        """The number of groups that a client trains at a rank, where `most` is the rank of those that train all."""
        every = len(self.kind.groups)
        count, rest = divmod(every * rank, most)
        if rest or count > every:
            fits = [n * most // every for n in range(1, every + 1) if n * most % every == 0]
            raise StrategyError(
                f"client {client.client_id} has rank {rank}, and a client of lora.kind = {self.kind.name} trains its "
                f"share of {every} groups, where rank {most} trains all; use one of the ranks "
                f"{', '.join(map(str, fits))} for it"
            )
        return count


def chosen(seed: int, number: int, client_id: int, counts: tuple[int, int]) -> list[int]:
    """The groups that a client trains in a round.

    Args:
        seed: of the run.
        number: of the round, from 1.
        client_id: of the client.
        counts: the number of all groups, and of those that it trains.
    """
    every, count = counts
    order = random.Random(f"{seed}/groups/{client_id}").sample(range(every), every)
    return sorted(order[((number - 1) * count + place) % every] for place in range(count))


def _listed(clients: Sequence[ClientInfo]) -> str:
    return ", ".join(map(str, sorted({client.rank for client in clients}, reverse=True)))
