"""LoRA-A2: rounds train B and A in turn, and each client those rows of all modules that matter most to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, to_fp32
from fedlora.adapters.means import Means
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import at_scaling
from ..tools.budget import most_worth
from ..tools.replies import arrivals

Factor = Literal["A", "B"]
_OTHER: Mapping[Factor, Factor] = {"A": "B", "B": "A"}
_IMPORTANCE = "lora-a2.importance"  # "<client>/<module>" -> the importance of each of its rows; -1: never trained


@dataclass(frozen=True)
class LoraA2(Strategy):
    """Client k trains the rows S_k of B (rounds 1, 3, ...) or of A (2, 4, ...): `B[:, S_k] += p_k dB_k`, A likewise.

    Koo et al. 2025, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients"
    (LoRA-A2), ACL 2025, https://arxiv.org/abs/2410.22815. The importance of row i of a module is
    `s |dB[:, i]| |A[i]|`, or `s |B[:, i]| |dA[i]|`, in the last round in which this client trained the row. S_k is the
    best row of each module, and then the best rows of all modules together, as many as the client's ranks have. Rows
    that the client never trained come first, in order. A row whose other factor is zero comes last, since it has no
    gradient. What a client does not train is frozen beside its adapter, so that it trains on the server's whole model.
    It sends S_k alone. A row that a client does not train counts as unchanged by it: the mean of the products is the
    product of the means, exactly. With one rank for all, S_k is everything, and this is `rolora`.

    Experimental: the paper is known here from excerpts. Its choice is made on the client, by what changes in this
    round; here the server makes it, from earlier rounds. That each module has a row, and that the chosen rows have at
    most as many numbers as the client's own ranks, where modules differ in size, are rules of ours. Its other learning
    rate for B is an optimizer's (`lora-plus`). Each client has an anchor of its own, so that clients that do not train
    everything are trained one at a time.
    Memory: one reply, filled up to the server's rank, and for each client a number for each row of the adapter. Cost:
    O(K d R), R the server's rank.
    """

    steady: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    replaces_folds: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The client's rows of both factors, and all others as a last fold. It trains and sends one of the factors."""
        ranks = _counts(state, client, number)
        own, rest = dict[str, LoraFactors](), dict[str, LoraFactors]()
        for name, f in state.adapter.lora.items():
            rows = chosen(state, number, client.client_id, name, ranks[name])
            own[name] = replace(f, A=f.A[rows], B=f.B[:, rows])
            left = f.B.any(dim=0)
            left[rows] = False
            if bool(left.any()):
                rest[name] = replace(f, A=f.A[left], B=f.B[:, left])
        mine = replace(state, adapter=replace(state.adapter, lora=own))
        factor = frozenset(trained_in(number))
        sent = replace(super().broadcast(mine, replace(client, ranks=ranks), number), plan=Plan(factor, factor))
        if all(ranks[name] == f.rank for name, f in state.adapter.lora.items()):
            return sent
        sent = replace(sent, steady=False)  # its rows are others in the next round
        if not rest:
            return sent
        folds = (*state.folds.parts, AdapterState(lora=rest))
        return replace(sent, base_version=state.folds.version + 1, folds=folds, folds_from=0)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean of the trained factor, with the server's rows where a client has none, and the new importances."""
        factor, held = trained_in(number), state.adapter.lora
        means, dense = Means(), Means()
        known = dict(state.memory.get(_IMPORTANCE, AdapterState()).tensors)
        for update in arrivals(updates, number):
            whole, importance, partial = dict[str, Tensor](), dict[str, Tensor](), False
            for name, f in update.adapter.lora.items():
                sent = _rows(replace(f, A=at_scaling(f, held[name].scaling)), factor)
                before, other = _rows(held[name], factor).to(sent), _rows(held[name], _OTHER[factor])
                rows = torch.tensor(chosen(state, number, update.client_id, name, len(sent)))
                whole[name] = before.index_copy(0, rows, sent)
                change = held[name].scaling * (whole[name] - before).norm(dim=1) * other.norm(dim=1)
                learned = rows[other[rows].any(dim=1)]
                old = _importance(state, update.client_id, name).to(change)
                importance[f"{update.client_id}/{name}"] = old.index_copy(0, learned, change[learned])
                partial = partial or len(sent) < held[name].rank
            means.add(whole, update.num_examples, update.client_id)
            dense.add(update.adapter.tensors, update.num_examples, update.client_id)
            known |= importance if partial else {}
        lora = {
            name: replace(held[name], **{factor: rows if factor == "A" else rows.T.contiguous()})
            for name, rows in means.values.items()
        }
        memory = {**state.memory, _IMPORTANCE: AdapterState(tensors=known)} if known else state.memory
        return replace(state.updated(lora, dense.values), memory=memory)


def trained_in(number: int) -> Factor:
    """The factor that a round trains: B first, since A has no gradient while B = 0."""
    return "B" if number % 2 else "A"


def chosen(state: ServerState, number: int, client_id: int, module: str, count: int) -> list[int]:
    """The rows of a module that a client trains in a round, in order.

    Args:
        state: the state before the round.
        number: number of the round.
        client_id: the client.
        module: name of the module.
        count: the number of its rows.
    """
    return sorted(_ranked(state, number, client_id, module)[0][:count])


def _counts(state: ServerState, client: ClientInfo, number: int) -> Mapping[str, int]:
    """Module -> the number of rows that the client trains."""
    held = state.adapter.lora
    worth = {name: _ranked(state, number, client.client_id, name)[1] for name in held}
    found = most_worth(
        client,
        {name: (f.B.shape[0], f.A.shape[1]) for name, f in held.items()},
        lambda module, row: worth[module][row] if row < len(worth[module]) else float("-inf"),
        growth=max((f.rank for f in held.values()), default=1),
    )
    return {name: min(count, held[name].rank) for name, count in found.items()}


def _ranked(state: ServerState, number: int, client_id: int, module: str) -> tuple[list[int], list[float]]:
    """A module's rows, the best one first, and what each of them is worth in this order."""
    known = _importance(state, client_id, module)
    alive = _rows(state.adapter.lora[module], _OTHER[trained_in(number)]).any(dim=1)
    worth = torch.where(known < 0, float("inf"), known).where(alive, -1.0)
    order = worth.argsort(descending=True, stable=True)
    return order.tolist(), worth[order].tolist()


def _importance(state: ServerState, client_id: int, module: str) -> Tensor:
    found = state.memory.get(_IMPORTANCE, AdapterState()).tensors.get(f"{client_id}/{module}")
    return torch.full((state.adapter.lora[module].rank,), -1.0) if found is None else found


def _rows(factors: LoraFactors, factor: Factor) -> Tensor:
    """A, or B transposed: a factor with a row for each rank."""
    return to_fp32(factors.A if factor == "A" else factors.B.T)
