"""Orthogonal start: neither A nor B is zero, and their product is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate

from .base import Initializer, Start


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """`A = c Q_1' X` and `B = c Y Q_2`, where Q_1 and Q_2 are every second row of an orthogonal Q, so that B A = 0.

    X [r/2, d_in] and Y [d_out, r/2] are normal. The start of PEFT's `init_lora_weights = "orthogonal"`
    (https://huggingface.co/docs/peft, LoraConfig), which names no paper. Both factors have a gradient from the first
    step on, where LoRA's A has none. The rank must be even. All clients need one rank, since a part of the rows of A
    and columns of B has a product that is not zero. A strategy that restarts its adapter uses the start in round 1
    alone.

    Args:
        size: c; 0.1 as in PEFT.
    """

    size: float = 0.1

    unequal_ranks: ClassVar[bool] = False

    def check_rank(self, rank: int) -> None:
        """Raises StrategyError for an odd rank."""
        if rank % 2:
            raise StrategyError(f"lora.init = orthogonal needs an even rank, got {rank}; set lora.rank = {rank + 1}")

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """Random factors whose product is zero; they depend on the run's seed by way of LoRA's own A."""
        return Start(replace(adapter, lora={name: self._of(f) for name, f in adapter.lora.items()}))

    def _of(self, first: LoraFactors) -> LoraFactors:
        digest = hashlib.sha256(first.A.contiguous().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rank, (d_out, d_in) = first.rank, (first.B.shape[0], first.A.shape[1])
        q = torch.linalg.qr(normal(rank, rank))[0]
        A, B = q[0::2].T @ normal(rank // 2, d_in), normal(d_out, rank // 2) @ q[1::2]
        return replace(first, A=(self.size * A).to(first.A), B=(self.size * B).to(first.B))
