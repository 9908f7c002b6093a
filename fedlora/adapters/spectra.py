"""How an update's energy is spread over directions: the singular values of each module's dW, from its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import lowrank
from .algebra import AdapterState, LoraFactors, delta, without_cores


def singular_values(adapter: AdapterState, most: int = 32) -> dict[str, list[float]]:
    """Module -> the largest singular values of its dW, descending.

    Args:
        adapter: of any ranks, with or without cores.
        most: values to return for each module; there are min(rank, d_out, d_in), or fewer. 0: all.

    Returns:
        Lists that end where the values fall below 1e-7 of the largest one, which is fp32's rounding; empty where
        dW = 0.
    """
    found: dict[str, list[float]] = {}
    for name, factors in without_cores(adapter).lora.items():
        s = _values(factors)
        s = s[(s > 1e-7 * s[:1]) & (s > 0)]
        found[name] = s[: most or len(s)].tolist()
    return found


def _values(factors: LoraFactors) -> Tensor:
    """Through Gram matrices, or the matrix itself where the factors outgrow it; fp64, descending."""
    b, a = factors.B.double(), factors.A.double()
    if factors.rank >= min(b.shape[0], a.shape[1]):
        return torch.linalg.svdvals(delta(LoraFactors(A=a, B=b, scaling=factors.scaling)))
    return abs(factors.scaling) * lowrank.singular_values(b.mT @ b, a @ a.mT)
