"""FedDyn: clients and server remember how clients pull apart, so that many local steps do not bias the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, keep_factors
from fedlora.adapters.state import difference, map_tensors
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..base import ServerState, trained_in_turn
from .correction import Correction, alone

_KEY = "feddyn.h"


@dataclass(frozen=True)
class FedDyn(Correction):
    """Dynamic regularisation of the one factor that is trained, over a strategy in which all else is fixed.

    Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", https://arxiv.org/abs/2111.04263,
    Algorithm 1. Client k adds `-<g_k, x> + alpha/2 |x - x_t|^2` to its loss, where x is the factor and x_t what it was
    sent, and then sets `g_k = g_k - alpha (x_k - x_t)`, which stays on its disk. The server sets
    `h = h - (n / m) (mean - x_t)`, for n replies of m clients, and `x = mean - h`; h is the paper's over alpha. Where
    this converges, the sum of the clients' gradients is zero, however many steps they make. Plain averaging stops
    elsewhere if clients differ.

    Differences: the mean weighs clients by their rows, which is the paper's for equal numbers of rows. Tensors trained
    in full, such as heads, are averaged as ever. A client whose reply is lost has changed its g_k, and the server not
    its h. Memory: one more copy of the factor, and one on each client's disk.

    Args:
        inner: a steady strategy that trains the same one factor of A, B and R in every round: ffa or fedsb.
        alpha: weight of both terms, above 0; the paper has 0.001 to 0.1.
        clients: m, the number of the federation's clients.
    """

    alpha: float = 0.01
    clients: int = 1

    correction: ClassVar[str] = "feddyn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise StrategyError(f"strategy.correction-weight = {self.alpha}, expected a number above 0")

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with the term that clients add."""
        sent = self.inner.broadcast(state, client, number)
        terms = (*sent.plan.terms, Term("dynamic", self.alpha))
        return replace(sent, plan=replace(sent.plan, terms=terms))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's mean, less h."""
        count = 0

        def counted() -> Iterator[ClientUpdate]:
            nonlocal count
            for update in updates:
                count += 1
                yield update

        new = self.inner.aggregate(state, counted(), number)
        factors = trained_in_turn(self.inner)[0]
        change = keep_factors(difference(alone(new.adapter), alone(state.adapter)), factors)
        held = state.memory.get(_KEY, AdapterState())
        share = count / max(self.clients, count)
        h = map_tensors(lambda _, d, before: -share * d if before is None else before - share * d, change, held)
        lora = map_tensors(lambda _, x, mine: x if mine is None else x - mine, alone(new.adapter), h).lora
        return replace(new.updated(lora, {}), memory={**new.memory, _KEY: h})
