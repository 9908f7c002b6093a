"""FlexLoRA: each client gets the leading part of the mean update's SVD, and optionally the rest as an anchor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedlora.adapters import AdapterState, LoraFactors, leading, stack, svd_each
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import with_rank_restored
from ..tools.replies import ModuleReplies, gather

# Singular values below this share of the largest one are only rounding of the fp32 factors.
_KNOWN = torch.finfo(torch.float32).eps


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
    Memory: the factors of all replies. Cost: O(d R^2 + R^3), where R is the sum of the r_k, and with `keep_tail` also
    of the number of components that are kept.

    Args:
        keep_tail: whether clients get the tail. Off by default, as in the paper, since the tail enlarges the download.
    """

    keep_tail: bool = False

    @property
    def replaces_folds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.keep_tail

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The r_j leading components and, with `keep_tail`, the others as an anchor that replaces the last one.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        sent = super().broadcast(balanced(state, client), client, number)
        if not (self.keep_tail and state.folds.version):  # other folds are those of the run's start
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
        stacks = {name: stack(part.factors, part.shares) for name, part in parts.items()}
        if self.keep_tail and state.folds.version:
            stacks = {name: stack([f, anchors(state, name, parts[name])]) for name, f in stacks.items()}
        lora = dict[str, LoraFactors]()
        tails = {name: f for name, f in state.folds.total().lora.items() if name not in parts}
        held, limit = state.adapter.lora, state.folds.max_rank
        befores = {name: held.get(name, max(part.factors, key=lambda f: f.rank)) for name, part in parts.items()}
        largest = max((before.rank for before in befores.values()), default=0)
        for name, (u, s, vh) in svd_each(stacks, self._kept(largest, limit), whole=self.keep_tail).items():
            before, dtype = befores[name], stacks[name].A.dtype
            rank, known = before.rank, int((s > _KNOWN * s[0]).sum())
            lora[name] = with_rank_restored(leading((u, s, vh), min(rank, known), before.scaling, dtype), before)
            kept = min(known, self._kept(rank, limit) or known)
            if kept > rank:
                tails[name] = leading((u[:, rank:], s[rank:], vh[rank:]), kept - rank, dtype=dtype)
        folds = state.folds.replaced(AdapterState(lora=tails)) if self.keep_tail else state.folds
        return replace(state.updated(lora, dense), folds=folds)

    def _kept(self, rank: int, limit: int) -> int:
        """The largest number of components that are kept of a module whose largest rank is `rank`; 0: all."""
        if not self.keep_tail:
            return rank
        return max(limit, rank) if limit else 0


def balanced(state: ServerState, client: ClientInfo) -> ServerState:
    """The state at this client's scaling, with the factor split evenly between A and B; rows with B = 0 are kept."""
    lora: dict[str, LoraFactors] = {}
    for name, f in state.adapter.lora.items():
        scaling = client.scaling_of(name)
        ratio = f.A.new_ones(f.rank)
        ratio[f.B.any(dim=0)] = (f.scaling / scaling) ** 0.5
        lora[name] = LoraFactors(A=ratio[:, None] * f.A, B=f.B * ratio, scaling=scaling)
    return replace(state, adapter=replace(state.adapter, lora=lora))


def components(state: ServerState, module: str) -> LoraFactors:
    """All components of a module on the server, at scaling 1: first the adapter's rows, then the tail."""
    return stack([state.adapter.lora[module], *(f.lora[module] for f in state.folds.parts if module in f.lora)])


def anchors(state: ServerState, module: str, parts: ModuleReplies) -> LoraFactors:
    """`sum_k p_k anchor_k`: each component, times the shares of all clients whose rank was too small for it."""
    every = components(state, module)
    missing = every.A.new_zeros(every.rank)
    for factors, share in zip(parts.factors, parts.shares, strict=True):
        missing[factors.rank :] += share
    return replace(every, A=missing[:, None] * every.A)
