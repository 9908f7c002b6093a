"""FLASC: clients get the largest entries of the global adapter, train all of them, and send the largest changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, first_ranks
from fedlora.adapters.state import difference, sum_of
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.exchange.codec import largest

from ..base import ServerState, Strategy
from ..tools.averaging import row_means


@dataclass(frozen=True)
class Flasc(Strategy):
    """`P <- sum_k p_k (P - top_d(P) + P_k)`, where client k starts from top_d(P) and ends at P_k; P are all A and B.

    Kuo et al. 2024, "Federated LoRA with Sparse Communication" (FLASC), https://arxiv.org/abs/2406.05233. top_d keeps
    the share d of P's entries that are largest in size, over all modules, and sets the others to zero; a client trains
    all of them. With d = 1 and equal ranks it is fedavg; with unequal ones, the mean of a row of A is over the clients
    that have it, as in rblora. The paper also sends only the largest changes back, which is
    `wire.upload-dtype = sparse` with `wire.upload-density` here, and has Adam on the server, which is
    `strategy.server-optimizer = adam`.

    Experimental: known here from its abstract and from notes. Differences: what a reply left out is added to
    the client's next one; a classifier's head is sent whole, but its changes compete with those of the factors.
    Memory: one reply. A client receives `d (r (d_in + d_out))` numbers of a module, and for each at least a byte more.

    Args:
        density: d, for all clients.
        tiers: densities "d1/d2/…" instead, for clients whose connections differ: that of client i is number i of
            these, counted round and round.
    """

    density: float = 0.25
    tiers: str = ""

    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for density in self._densities:
            if not 0 < density <= 1:
                raise StrategyError(
                    f"strategy.options: flasc's densities are density = {self.density:g} and tiers = {self.tiers!r}, "
                    "expected numbers above 0 and at most 1, such as tiers = 0.25/0.25/1"
                )

    @property
    def one_start(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(set(self._densities)) == 1

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The largest entries of the mean factors."""
        sent = super().broadcast(state, client, number)
        density = self._densities[client.client_id % len(self._densities)]
        factors = largest(AdapterState(lora=sent.adapter.lora), density).lora
        return replace(sent, adapter=replace(sent.adapter, lora=factors), sparse=density < 1)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of the replies, to each of which is added what its client was not sent."""
        return row_means(state, (_completed(update, state.adapter) for update in updates), number)

    @property
    def _densities(self) -> list[float]:
        if not self.tiers:
            return [self.density]
        try:
            return [float(part) for part in self.tiers.split("/")]
        except ValueError:
            return [float("nan")]


def _completed(update: ClientUpdate, adapter: AdapterState) -> ClientUpdate:
    """The reply as if its client had been sent the whole adapter."""
    start = update.start
    if start is None:
        raise StrategyError(f"client {update.client_id}: flasc needs the adapter from which the client started")
    trained = update.adapter.lora
    mine = {name: first_ranks(adapter.lora[name], f.rank, f.scaling) for name, f in trained.items()}
    withheld = difference(AdapterState(lora=mine), start)
    lora = sum_of(AdapterState(lora=trained), withheld).lora
    return replace(update, adapter=replace(update.adapter, lora=lora))
