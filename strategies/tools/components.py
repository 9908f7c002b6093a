"""Mean updates by their singular components, strongest first, for methods that send each client the leading ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.adapters import LoraFactors, leading
from fedlora.adapters.lowrank import Svd
from fedlora.exchange import ClientInfo

from ..base import ServerState
from .averaging import with_rank_restored

# Singular values below this share of the largest one are only rounding of the fp32 factors.
_KNOWN = torch.finfo(torch.float32).eps


def balanced(state: ServerState, client: ClientInfo) -> ServerState:
    """The state at this client's scaling, with the factor split evenly between A and B; rows with B = 0 are kept."""
    lora: dict[str, LoraFactors] = {}
    for name, f in state.adapter.lora.items():
        scaling = client.scaling_of(name)
        ratio = f.A.new_ones(f.rank)
        ratio[f.B.any(dim=0)] = (f.scaling / scaling) ** 0.5
        lora[name] = LoraFactors(A=ratio[:, None] * f.A, B=f.B * ratio, scaling=scaling)
    return replace(state, adapter=replace(state.adapter, lora=lora))


def known(svd: Svd) -> int:
    """The number of components that are more than rounding."""
    _, s, _ = svd
    return int((s > _KNOWN * s[0]).sum())


def strongest(svd: Svd, before: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    """The leading components as the server's factors, at its rank and scaling.

    If there are fewer, the remaining rows of A keep their value, with B = 0: rows that are zero in both factors would
    have no gradient and never be trained.

    Args:
        svd: of the mean update.
        before: the server's factors of the module before the round.
        dtype: of the factors.
    """
    return with_rank_restored(leading(svd, min(before.rank, known(svd)), before.scaling, dtype), before)
