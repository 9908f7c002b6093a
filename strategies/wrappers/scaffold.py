"""SCAFFOLD: clients step along their gradient, corrected by how it differs from the gradient of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, keep_factors
from fedlora.adapters.state import difference, map_tensors
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..base import ServerState, trained_in_turn
from .correction import Correction, alone

_SUM, _SEEN = "scaffold.sum", "scaffold.seen"


@dataclass(frozen=True)
class Scaffold(Correction):
    """Control variates for the one factor that is trained, over a strategy in which all else is fixed.

    Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    https://arxiv.org/abs/1910.06378, Algorithm 1, option II. With x the factor, and c_k what client k remembers of its
    gradient, it steps along `g - c_k + c`, and then sets `c_k = c_k - c + (x - y_k) / H`, where y_k is what it ends
    with, and H the sum of the steps' learning rates (the paper's K eta_l, for a rate that does not change). With SGD
    this is the mean of its gradients g. c_k stays on its disk. `c = sum_k n_k c_k / sum_k n_k` over all clients, with
    n_k rows. A client sends y_k and H alone, from which the server knows how c_k changed. c is sent to clients, since
    those that were not in every round could not know it. Where this converges, all c_k are the gradients there, and
    their sum is zero, however many steps clients make. Plain averaging stops elsewhere if clients differ.

    A message says which reply the server counted last, and the client goes on from its c_k of that round. So a reply
    that was lost on the way leaves no trace in c.

    Differences: c weighs clients by their rows, as all means here do; the paper counts clients alike. Rows of clients
    that were in no round yet are not known, and are taken to be the mean of the others'. The server's rate eta_g is 1.
    Tensors trained in full, such as heads, are averaged as ever. Memory: one more copy of the factor, and one on each
    client's disk.

    Args:
        inner: a steady strategy that trains the same one factor of A, B and R in every round: ffa or fedsb.
        clients: the number of the federation's clients.
    """

    clients: int = 1

    correction: ClassVar[str] = "scaffold"

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with c, and the term by which clients add `c - c_k` to their gradients."""
        sent = self.inner.broadcast(state, client, number)
        seen = _Seen.of(state)
        control = self._control(state, seen)
        if control is not None:
            control = AdapterState(
                lora={name: replace(f, scaling=sent.adapter.lora[name].scaling) for name, f in control.lora.items()}
            )
        return replace(
            sent,
            plan=replace(sent.plan, terms=(*sent.plan.terms, Term("control", 0.0))),
            control=control,
            counted=seen.rounds.get(client.client_id, 0),
        )

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's mean; the sum of all `n_k c_k` takes in the replies as they pass."""
        factors = trained_in_turn(self.inner)[0]
        seen = _Seen.of(state)
        control = self._control(state, seen) or AdapterState()
        total = state.memory.get(_SUM, AdapterState())

        def passing() -> Iterator[ClientUpdate]:
            nonlocal total
            for update in updates:
                rate = update.metrics.get("train-rate", 0.0)
                if rate > 0:  # without one, the client goes on from the c_k that it had
                    begun = keep_factors(alone(update.start or state.adapter), factors)
                    moved = difference(begun, update.adapter)
                    total = _added(total, moved, rate, control, seen.count(update, number))
                yield update

        new = self.inner.aggregate(state, passing(), number)
        return replace(new, memory={**new.memory, _SUM: total, _SEEN: seen.kept()})

    def _control(self, state: ServerState, seen: _Seen) -> AdapterState | None:
        """c; None before the first replies."""
        if not state.memory.get(_SUM, AdapterState()).lora:
            return None
        rows = seen.all_rows(self.clients)
        return map_tensors(lambda _, total: total / rows, state.memory[_SUM])


def _added(total: AdapterState, moved: AdapterState, rate: float, control: AdapterState, rows: int) -> AdapterState:
    """The sum of all `n_k c_k`, with `n_k ((x - y_k) / H - c)` of one reply.

    Args:
        total: the sum before.
        moved: x - y_k.
        rate: H.
        control: c, as the client was sent it.
        rows: n_k.
    """

    def add(_: str, move: Tensor, c: Tensor | None, before: Tensor | None) -> Tensor:
        change = rows * (move / rate if c is None else move / rate - c)
        return change if before is None else before + change

    return map_tensors(add, moved, control, total)


@dataclass
class _Seen:
    """The clients whose replies counted so far: their rows, and the last round in which they did."""

    rows: dict[int, int]
    rounds: dict[int, int]

    @classmethod
    def of(cls, state: ServerState) -> _Seen:
        ids, rows, rounds = (state.memory[_SEEN].tensors["clients"] if _SEEN in state.memory else _nobody()).tolist()
        return cls(dict(zip(ids, rows, strict=True)), dict(zip(ids, rounds, strict=True)))

    def count(self, update: ClientUpdate, number: int) -> int:
        """Note a reply; the client's rows, which are those of its first one."""
        self.rounds[update.client_id] = number
        return self.rows.setdefault(update.client_id, update.num_examples)

    def all_rows(self, clients: int) -> float:
        """The rows of all clients, where those of the others are as many on average as those of the ones seen."""
        return sum(self.rows.values()) * max(clients / len(self.rows), 1.0)

    def kept(self) -> AdapterState:
        """The state's entry: ids, rows and rounds of the clients, [3, clients]."""
        ids = sorted(self.rows)
        columns = [(each, self.rows[each], self.rounds[each]) for each in ids]
        table = torch.tensor(columns, dtype=torch.int64).reshape(-1, 3).T.contiguous()
        return AdapterState(tensors={"clients": table})


def _nobody() -> Tensor:
    return torch.empty(3, 0, dtype=torch.int64)
