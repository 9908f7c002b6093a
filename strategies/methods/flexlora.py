"""FlexLoRA: each client gets the leading part of the mean update's SVD, and optionally the rest as anchor or fold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, LoraFactors, Sum, leading, stack, svd_of_sums
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.components import balanced, known, strongest
from ..tools.replies import ModuleReplies, gather


@dataclass(frozen=True)
class FlexLora(Strategy):
    """`U S V' = sum_k p_k s_k B_k A_k`; client j starts from `B = U sqrt(S/s_j)`, `A = sqrt(S/s_j) V'`, cut to r_j.

    Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
    (FlexLoRA), https://arxiv.org/abs/2402.11505. The SVD is computed from the stacked factors, and S is split evenly
    between A and B. If the mean update has fewer components than the largest rank, the remaining rows of A keep their
    value, with B = 0: rows that are zero in both factors would have no gradient and never be trained.

    `keep_tail` is not in the paper. With it, the broadcast also carries the components beyond the client's rank, the
    *tail*, as a frozen anchor, so that all clients train the same model whatever their rank. The server knows which
    anchors it sent and adds `sum_k p_k anchor_k` back before the next SVD, so that no round loses anything.
    `anchor.max-rank` then limits the number of components that are kept, but never below the largest rank of the
    clients; 0: min(d_out, d_in), which loses nothing.

    `fold_tail` is what Yan et al. 2026, "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning",
    https://arxiv.org/abs/2603.08014, do with the components beyond the largest rank: they become a fold, the same for
    all clients, which is never taken back. Fold and adapter together are the mean update. Unlike the tail of
    `keep_tail`, what is folded does not return to the adapter, and may be merged into the base. What a client of a
    smaller rank is not sent is missing from its next update, as without the option. The paper is known here from its
    abstract: how it splits S, and after how many rounds it merges, is not confirmed.

    Memory: the factors of all replies. Cost: O(d R^2 + R^3), where R is the sum of the r_k, and with `keep_tail` also
    of the number of components that are kept.

    Args:
        keep_tail: whether clients get the tail. Off by default, as in the paper, since the tail enlarges the download.
        fold_tail: whether what is beyond the largest rank becomes a fold. Not together with `keep_tail`.
    """

    keep_tail: bool = False
    fold_tail: bool = False

    of_ideal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep_tail and self.fold_tail:
            raise StrategyError(
                "strategy.options: flexlora's keep_tail sends what is beyond the ranks anew in each round, and its "
                "fold_tail folds it for good; set one of them to true"
            )

    @property
    def replaces_folds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.keep_tail

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The r_j leading components and, with `keep_tail`, the others as an anchor that replaces the last one.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        sent = super().broadcast(balanced(state, client), client, number)
        if not (self.keep_tail and state.folds.version):  # other folds are those of the run's start, or `fold_tail`'s
            return sent
        anchor: dict[str, LoraFactors] = {}
        for name in state.adapter.lora:
            every = components(state, name)
            beyond = every.B.any(dim=0)
            beyond[: client.rank_of(name)] = False
            if bool(beyond.any()):
                anchor[name] = LoraFactors(A=every.A[beyond], B=every.B[:, beyond], scaling=1.0)
        # The whole anchor, whatever folds the client holds: the anchors of one version depend on the rank, and clients
        # on one node share their folds.
        return replace(sent, folds=(AdapterState(lora=anchor),) if anchor else (), folds_from=0)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The components of the mean update, strongest first. A module or tensor in no reply keeps its value."""
        parts, dense = gather(updates, number)
        sums = {name: part.ideal for name, part in parts.items()}
        if self.keep_tail and state.folds.version:
            tails_sent = {name: anchors(state, name, part) for name, part in parts.items()}
            sums = {n: Sum([*s.parts, tails_sent[n]], [*s.weights, 1.0]) for n, s in sums.items()}
        lora, tails = dict[str, LoraFactors](), dict[str, LoraFactors]()
        held, limit = state.adapter.lora, state.folds.max_rank if self.keep_tail else 0
        befores = {name: held.get(name, max(part.factors, key=lambda f: f.rank)) for name, part in parts.items()}
        largest = max((before.rank for before in befores.values()), default=0)
        whole = self.keep_tail or self.fold_tail
        for name, svd in svd_of_sums(sums, self._kept(largest, limit), whole=whole).items():
            before, dtype = befores[name], sums[name].dtype
            lora[name] = strongest(svd, before, dtype)
            rank, count = before.rank, known(svd)
            kept = min(count, self._kept(rank, limit) or count)
            if kept > rank:
                u, s, vh = svd
                tails[name] = leading((u[:, rank:], s[rank:], vh[rank:]), kept - rank, dtype=dtype)
        folds = state.folds
        if self.keep_tail:
            others = {name: f for name, f in folds.total().lora.items() if name not in parts}
            folds = folds.replaced(AdapterState(lora={**others, **tails}))
        elif tails:
            folds = folds.push(AdapterState(lora=tails))
        return replace(state.updated(lora, dense), folds=folds)

    def _kept(self, rank: int, limit: int) -> int:
        """The largest number of components that are kept of a module whose largest rank is `rank`; 0: all."""
        if not (self.keep_tail or self.fold_tail):
            return rank
        return max(limit, rank) if limit else 0


def components(state: ServerState, module: str) -> LoraFactors:
    """All components of a module on the server, at scaling 1: first the adapter's rows, then the tail."""
    return stack([state.adapter.lora[module], *(f.lora[module] for f in state.folds.parts if module in f.lora)])


def anchors(state: ServerState, module: str, parts: ModuleReplies) -> LoraFactors:
    """`sum_k p_k anchor_k`: each component, times the shares of all clients whose rank was too small for it."""
    every = components(state, module)
    missing = every.A.new_zeros(every.rank)
    for rank, share in parts.of_ranks.items():
        missing[rank:] += share
    return replace(every, A=missing[:, None] * every.A)
