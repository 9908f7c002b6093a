"""The matrices of a round as sums of rank-1 terms `c_i b_i a_i'` over one list of columns b and rows a by module.

What clients sent, what they started from and what the server made of it are each a vector of coefficients c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks
from fedlora.exchange import Broadcast, ClientUpdate

from ..base import ServerState, whole_adapter


@dataclass(frozen=True)
class _Group:
    """Consecutive terms of a list: those of one or more updates.

    Args:
        first: the number of the first of them.
        scales: [n], the scaling that each term has in its update.
    """

    first: int
    scales: Tensor


class _TermList:
    """One module's rank-1 terms `b_i a_i'`, over which each matrix in question is a vector of coefficients."""

    def __init__(self) -> None:
        self._factors: list[LoraFactors] = []
        self._count = 0

    def add(self, *factors: LoraFactors) -> _Group:
        """The terms of these updates, whose sum the group stands for."""
        scales = torch.tensor([f.scaling for f in factors for _ in range(f.rank)], dtype=torch.float64)
        group = _Group(self._count, scales)
        self._factors += factors
        self._count += len(scales)
        return group

    def coefficients(self, group: _Group, weight: float = 1.0, most: int | None = None) -> Tensor:
        """[N], `weight` times the sum of a group, or of its first `most` terms; N counts all terms added so far."""
        scales = group.scales[:most]
        coefficients = torch.zeros(self._count, dtype=torch.float64)
        coefficients[group.first : group.first + len(scales)] = weight * scales
        return coefficients

    def columns(self) -> Tensor:
        """All b_i, [d_out, N]."""
        return torch.cat([f.B for f in self._factors], dim=1)

    def rows(self) -> Tensor:
        """All a_i, [N, d_in]."""
        return torch.cat([f.down for f in self._factors])


@dataclass(frozen=True)
class ModuleTerms:
    """One module's rank-1 terms and the coefficients of each matrix over them.

    Args:
        B: [d_out, N].
        A: [N, d_in].
        ideal: [N], the mean of what clients trained.
        added: [N], what the round added on the server, and on the clients' bases.
        moves: [K, N], each client's change.
        shares: [K], p_k.
        who: [K], which of the round's updates these clients sent.
        clients: the number of leading terms that are the clients' own.
        rank: of the server's adapter.
    """

    B: Tensor
    A: Tensor
    ideal: Tensor
    added: Tensor
    moves: Tensor
    shares: Tensor
    who: Tensor
    clients: int
    rank: int


@dataclass(frozen=True)
class RoundTerms:
    """A round as its modules are read from it.

    Args:
        before, after: the server's states.
        whole: client id -> the factors that it ended with.
        examples: client id -> its weight.
        sent: client id -> its broadcast.
        anchors: client id -> the folds of its own that it trained on; none where all clients share them.
        new: the folds that the round added.
        replaced: the folds that these stand for, besides what the round added.
    """

    before: ServerState
    after: ServerState
    whole: Mapping[int, Mapping[str, LoraFactors]]
    examples: Mapping[int, int]
    sent: Mapping[int, Broadcast]
    anchors: Mapping[int, Sequence[AdapterState]]
    new: Sequence[AdapterState]
    replaced: Sequence[AdapterState]

    @classmethod
    def of(
        cls, before: ServerState, after: ServerState, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast]
    ) -> RoundTerms:
        whole = {update.client_id: whole_adapter(update, before).lora for update in updates}
        # Folds that all clients share cancel out; where each holds its own, they are part of what it trained on.
        shared = all(_holds(sent[k], before.folds.parts) for k in whole)
        folds_from, new = after.folds.since(before.folds.version)
        return cls(
            before,
            after,
            whole,
            examples={update.client_id: update.num_examples for update in updates},
            sent=sent,
            anchors={k: () if shared else _held_by(sent[k], before.folds.parts) for k in whole},
            new=new if shared else after.folds.parts,
            replaced=before.folds.parts if shared and folds_from != before.folds.version else (),
        )

    def module(self, name: str) -> ModuleTerms | None:
        """One module; None where no client sent it."""
        clients = [k for k in self.whole if name in self.whole[k]]
        if not clients:
            return None
        total = sum(self.examples[k] for k in clients)
        shares = torch.tensor([self.examples[k] / total for k in clients], dtype=torch.float64)
        server = self.before.adapter.lora[name]
        terms = _TermList()
        trained = [terms.add(self.whole[k][name]) for k in clients]
        start = terms.add(server)
        anchors = [terms.add(*_of(name, self.anchors[k])) for k in clients]
        made = terms.add(self.after.adapter.lora[name], *_of(name, self.new))
        replaced = terms.add(*_of(name, self.replaced))
        # A client starts from the first rows of the server's factors, or from what is no part of the server's terms.
        own = [_starts_apart(self.sent[k], name, server) or bool(self.anchors[k]) for k in clients]
        starts = [
            terms.add(self.sent[k].adapter.lora[name]) if apart else start
            for k, apart in zip(clients, own, strict=True)
        ]
        ranks = [None if apart else self.whole[k][name].rank for k, apart in zip(clients, own, strict=True)]

        def mean(groups: Sequence[_Group]) -> Tensor:
            return torch.stack([terms.coefficients(g, float(p)) for g, p in zip(groups, shares, strict=True)]).sum(0)

        moves = [
            terms.coefficients(end) - terms.coefficients(begin, most=rank)
            for end, begin, rank in zip(trained, starts, ranks, strict=True)
        ]
        return ModuleTerms(
            B=terms.columns(),
            A=terms.rows(),
            ideal=mean(trained),
            added=terms.coefficients(made) - terms.coefficients(replaced) - mean(anchors),
            moves=torch.stack(moves),
            shares=shares,
            who=torch.tensor([place for place, k in enumerate(self.whole) if name in self.whole[k]]),
            clients=start.first,
            rank=self.after.adapter.lora[name].rank,
        )


def _starts_apart(broadcast: Broadcast, module: str, server: LoraFactors) -> bool:
    """Whether a client was sent other rows than the server's first ones, some of their entries, or a part of a core."""
    sent = broadcast.adapter.lora[module]
    if server.R is not None or broadcast.sparse:
        return True
    if sent.rank == server.rank:
        return False
    first = first_ranks(server, sent.rank, sent.scaling)
    return not (torch.equal(sent.A, first.A.to(sent.A)) and torch.equal(sent.B, first.B.to(sent.B)))


def _holds(sent: Broadcast, parts: Sequence[AdapterState]) -> bool:
    """Whether the client ends up with these folds: it got them all, or the last of them after those it had."""
    missing = len(parts) - len(sent.folds) if sent.folds_from else 0
    return len(sent.folds) + missing == len(parts) and all(
        got is part for got, part in zip(sent.folds, parts[missing:], strict=True)
    )


def _held_by(sent: Broadcast, parts: tuple[AdapterState, ...]) -> tuple[AdapterState, ...]:
    """The folds on which a client trains: the server's, or its own, which it got whole."""
    return parts if _holds(sent, parts) else sent.folds


def _of(name: str, parts: Sequence[AdapterState]) -> list[LoraFactors]:
    return [part.lora[name] for part in parts if name in part.lora]
