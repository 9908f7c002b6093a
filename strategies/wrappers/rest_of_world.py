"""Rest of world: each client goes on from its own parts, and is sent the mean of the others' beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState
from .wrapper import Wrapper

_OWN, _SUM, _ROWS = "rest-of-world.client-", "rest-of-world.sum", "rest-of-world.rows"


@dataclass(frozen=True)
class RestOfWorld(Wrapper):
    """The server keeps the last parts of each client, and sends it `sum_{j != k} n_j P_j / sum_{j != k} n_j`.

    j goes over the clients that have replied so far, each with its n_j rows; without any other one, the mean is 0, as
    at first. Parts that stand for others are frozen on the client, and never sent back. The inner strategy averages
    what is left, such as heads. `lora.kind` asks for this wrapper; see `adapters/kinds/fed_alt.py`.

    Memory: the parts of every client, and their sum in fp64, in the saved state too. Cost: a pass over all of them for
    each round, and one over the sum for each message. The client's own part is taken out of the sum in fp64, whose
    rounding is below that of fp32.

    Args:
        inner: a strategy for every adapter kind, which leaves tensors that no reply contains as they are.
        others: ends of names: (that of the others' mean, that of the part whose mean it is).
    """

    others: tuple[tuple[str, str], ...] = ()

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with the client's own parts and the mean of the others'."""
        sent = self.inner.broadcast(state, client, number)
        own = state.memory.get(f"{_OWN}{client.client_id}", AdapterState()).tensors
        rows = _rows(state)
        mine = rows.get(client.client_id, 0)
        rest = sum(rows.values()) - mine
        means: dict[str, Tensor] = {}
        for name, total in state.memory.get(_SUM, AdapterState()).tensors.items() if rest else ():
            others = total - mine * own[name].double() if mine else total
            means[self._mean_of(name)] = (others / rest).float()
        return replace(
            sent,
            adapter=AdapterState(lora=sent.adapter.lora, tensors={**sent.adapter.tensors, **own, **means}),
            plan=replace(sent.plan, frozen=frozenset(mean for mean, _ in self.others)),
        )

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's next state from all but the clients' own parts, which are kept by client."""
        ends = {part for _, part in self.others}
        rows, owned = _rows(state), {key: own for key, own in state.memory.items() if key.startswith(_OWN)}

        def without_own() -> Iterator[ClientUpdate]:
            for update in updates:
                own = {name: t for name, t in update.adapter.tensors.items() if _end(name) in ends}
                owned[f"{_OWN}{update.client_id}"] = AdapterState(tensors=own)
                rows[update.client_id] = update.num_examples
                left = {name: t for name, t in update.adapter.tensors.items() if name not in own}
                yield replace(update, adapter=AdapterState(lora=update.adapter.lora, tensors=left))

        new = self.inner.aggregate(state, without_own(), number)
        total: dict[str, Tensor] = {}
        for client in sorted(rows):
            for name, part in owned[f"{_OWN}{client}"].tensors.items():
                weighed = rows[client] * part.double()
                total[name] = total[name] + weighed if name in total else weighed
        table = torch.tensor([sorted(rows), [rows[client] for client in sorted(rows)]], dtype=torch.int64)
        kept = {_SUM: AdapterState(tensors=total), _ROWS: AdapterState(tensors={"clients": table})}
        return replace(new, memory={**new.memory, **owned, **kept})

    def _mean_of(self, name: str) -> str:
        """The name of the tensor that holds the others' mean of this one."""
        end = _end(name)
        return name.removesuffix(end) + next(mean for mean, part in self.others if part == end)


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _rows(state: ServerState) -> dict[int, int]:
    """The rows of the clients that have replied so far, by client."""
    if _ROWS not in state.memory:
        return {}
    ids, rows = state.memory[_ROWS].tensors["clients"].tolist()
    return dict(zip(ids, rows, strict=True))


def names_of(others: Mapping[str, str], kind: str) -> tuple[tuple[str, str], ...]:
    """A kind's `others`, with the ends of names under which its parts stand in an adapter."""
    return tuple((f"{kind}_{mean}", f"{kind}_{part}") for mean, part in sorted(others.items()))
