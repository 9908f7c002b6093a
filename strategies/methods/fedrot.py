"""FedRot-LoRA: each client's factors are turned towards the server's before their means are taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, to_fp32
from fedlora.exchange import ClientUpdate

from ..base import ServerState
from ..tools.one_rank import OneRank, checked, factor_means

# The weight of the identity where the reference leaves a direction open: above fp64's rounding, below fp32's.
_OPEN = 1e-10


@dataclass(frozen=True)
class FedRot(OneRank):
    """`A = sum_k p_k R_k' A_k`, `B = sum_k p_k B_k R_k`, where R_k is the orthogonal matrix that fits the server best.

    Experimental: Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
    https://arxiv.org/abs/2602.23638, is known here from its abstract, notes, and what the authors' code does. `B_k A_k`
    stays what it is when a matrix and its inverse are put between the factors, but the means do not. In even rounds
    `R_k = U V'` with `U S V' = A_k A'`, which minimises `|R' A_k - A|`; in odd rounds with `U S V' = B_k' B`, which
    minimises `|B_k R - B|`. A and B are the factors from which the round started. Round 1 aligns nothing. The result is
    as far from the mean of the updates as the turned factors are apart.
    Differences from the authors' code: the server turns the factors, where theirs are turned by the clients; R_k may
    be a reflection, where theirs has the determinant 1; a softened rotation is left out. Where the reference leaves a
    direction open, R_k is the solution nearest to the identity. Not confirmed: which factor the paper begins with.
    Memory: one reply. Cost: O(K (d r^2 + r^3)).
    """

    method: ClassVar[str] = "fedrot"
    steady: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of the turned factors. A module or tensor that no reply contains keeps its value.

        Raises:
            StrategyError: a reply's rank differs from the server's, or its scaling from that of the first reply.
        """
        held = state.adapter.lora
        replies = checked(updates, number, held, self.method)
        if number > 1:
            replies = (_turned(reply, held, "B" if number % 2 else "A") for reply in replies)
        return state.updated(*factor_means(replies))


def _turned(update: ClientUpdate, held: Mapping[str, LoraFactors], factor: Literal["A", "B"]) -> ClientUpdate:
    """The same updates in factors of which one is as near as possible to the server's.

    Args:
        update: a client's reply.
        held: the server's factors before the round.
        factor: the factor that is brought near.
    """
    lora = dict(update.adapter.lora)
    for name, f in lora.items():
        if name in held:
            server = held[name]
            across = f.A.double() @ server.A.double().T if factor == "A" else f.B.double().T @ server.B.double()
            turn, dtype = _nearest_turn(across), to_fp32(f.A).dtype
            lora[name] = replace(f, A=(turn.T @ f.A.double()).to(dtype), B=(f.B.double() @ turn).to(dtype))
    return replace(update, adapter=replace(update.adapter, lora=lora))


def _nearest_turn(across: Tensor) -> Tensor:
    """The orthogonal R with the largest `trace(R' M)`; of several, the nearest to the identity.

    Args:
        across: M [r, r], in fp64.
    """
    size = torch.linalg.matrix_norm(across)
    open_to = torch.eye(len(across), dtype=across.dtype, device=across.device)
    u, _, vh = torch.linalg.svd(across + _OPEN * size * open_to if size > 0 else open_to)
    return u @ vh
