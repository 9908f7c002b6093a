"""FLoRA: the stack of all replies is folded into the base, and the adapter restarts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.adapter import AdapterState, LoraFactors, initial, stack
from fedlora.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .base import ServerState, sliced, total
from .means import gather


@dataclass(frozen=True)
class Flora:
    """Folds `B = [B_1|...|B_K]`, `A = [p_1 s_1 A_1; ...; p_K s_K A_K]`: the product is `sum_k p_k s_k B_k A_k`.

    Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations", https://arxiv.org/abs/2409.05976, Algorithm 1. Here the scale is folded in as well, and
    the fold is kept as a frozen adapter beside the base, which may be quantized, rather than added to its weights.
    Memory: the factors of all replies.

    Args:
        seed: of the restarts; a run's round loop sets it to the run's seed.
        max_rank: the largest rank of the accumulated folds; 0: min(d_out, d_in), where nothing is lost.
        compact: False keeps every fold as it came, for clients that merge folds into an fp32 base.
    """

    seed: int = 0
    max_rank: int = 0
    compact: bool = True

    linear: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_rank < 0:
            raise StrategyError(f"strategy.options: flora's max_rank = {self.max_rank}, expected 0 (no limit) or more")

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Serves any ranks and scalings."""

    def init(self, adapter: AdapterState) -> ServerState:
        """The state before round 1, which starts from the given adapter."""
        return ServerState(adapter=adapter)

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """The first r_j rows of the round's random A with B = 0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank exceeds the largest of the run.
        """
        lora = {
            # B = 0, so A carries no scale: a client starts with A as PEFT would draw it, whatever its scaling
            name: sliced(LoraFactors(f.A, f.B, client.scaling_of(name)), client, name)
            for name, f in state.adapter.lora.items()
        }
        folds_from, folds = state.folds.since(client.known_base_version)
        return Broadcast(
            round=round,
            adapter=AdapterState(lora=lora, dense=state.adapter.dense),
            base_version=state.folds.version,
            folds=folds,
            folds_from=folds_from,
        )

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The stack as one more fold, and the next round's restart."""
        parts, dense = gather(updates, round)
        fold = AdapterState(lora={name: stack(p.factors, p.shares) for name, p in parts.items()})
        adapter = AdapterState(
            lora=restart(state.adapter, self.seed, round + 1).lora, dense={**state.adapter.dense, **dense}
        )
        return ServerState(adapter=adapter, folds=state.folds.push(fold, self.max_rank, self.compact))

    def global_adapter(self, state: ServerState) -> AdapterState:
        """The sum of all folds."""
        return total(state)


def restart(adapter: AdapterState, seed: int, round: int) -> AdapterState:
    """A fresh adapter of the same shapes, ranks and scalings: A by (seed, round), B = 0."""
    lora = adapter.lora
    # torch seeds its CPU generator with the low 32 bits alone, so both numbers must be mixed into them
    digest = hashlib.sha256(f"{seed}/{round}".encode()).digest()
    return initial(
        shapes={name: (f.B.shape[0], f.A.shape[1]) for name, f in lora.items()},
        ranks={name: f.rank for name, f in lora.items()},
        scalings={name: f.scaling for name, f in lora.items()},
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")),
    )
