"""Fed-PLoRA: each round, a client trains as many of the rank-one modules as it affords, beside the frozen others."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import row_means


@dataclass(frozen=True)
class FedPLora(Strategy):
    """`dW = s sum_j b_j a_j'`; a client of rank r_k trains r_k of the R terms, and each is averaged over its clients.

    Experimental: Zhang et al. 2026, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation"
    (Fed-PLoRA), https://arxiv.org/abs/2602.16936, is known here from its abstract and notes. `b_j` and `a_j` are column
    j of B and row j of A. The terms that a client does not train stand beside its base model as a frozen anchor, so
    that all clients start from the same model whatever their rank. Row j of `s_k A_k` and column j of B_k are averaged
    over the clients that trained them; terms that nobody trained keep their value. With equal ranks this is `fedavg`.
    Which terms are trained is drawn by the run's seed and the round: the clients of a round take the first r_k of one
    random order, so that clients of one rank can be trained together. Not confirmed: how the paper selects them, by
    client or for each module of the model apart. Means are weighted by examples. The product of the means is not the
    mean of the products.
    Memory: one reply, since each is added to the means when it arrives.
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    replaces_folds: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The terms that this client trains in this round, and the others as an anchor that replaces the last one.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        turn = replace(state, adapter=_in_turn(state, number))
        # The rows that a client has change from round to round, and with them what a number format left out of them.
        sent = replace(super().broadcast(turn, client, number), steady=False)
        frozen: dict[str, LoraFactors] = {}
        for name, f in turn.adapter.lora.items():
            rest = slice(client.rank_of(name), None)
            if bool(f.B[:, rest].any()):
                frozen[name] = LoraFactors(A=f.A[rest], B=f.B[:, rest], scaling=f.scaling)
        if not frozen:
            return sent
        # A version of its own for each round, which builds on no other: clients of one rank alone have the same anchor.
        folds = (*state.folds.parts, AdapterState(lora=frozen))
        return replace(sent, folds=folds, folds_from=0, base_version=state.folds.version + number)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of each term. A module, term or tensor that no reply contains keeps its value."""
        after = row_means(replace(state, adapter=_in_turn(state, number)), updates, number)
        return replace(after, adapter=_in_turn(after, number, back=True))


def _in_turn(state: ServerState, number: int, back: bool = False) -> AdapterState:
    """The same update with its terms in a round's order; with `back`, from that order in their own."""
    lora: dict[str, LoraFactors] = {}
    for name, f in state.adapter.lora.items():
        order = turn_of(f.rank, state.seed, number)
        if back:
            order = sorted(range(f.rank), key=order.__getitem__)
        lora[name] = replace(f, A=f.A[order], B=f.B[:, order])
    return replace(state.adapter, lora=lora)


def turn_of(rank: int, seed: int, number: int) -> list[int]:
    """The order in which a round takes the terms of a module; a client of rank r trains the first r.

    Args:
        rank: number of terms.
        seed: of the run.
        number: of the round.
    """
    return random.Random(f"{seed}/terms/{number}").sample(range(rank), rank)
