"""Replies for one module drawn by hypothesis, and the server's adapter before them. All in fp64, so that the
method alone is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import ClientUpdate
from tests.naive.dense import Part


@st.composite
def replies(draw: st.DrawFn, least: int = 1) -> list[Part]:
    """Any ranks, above min(d_out, d_in) and equal to it as well; scalings by alpha = 2r, 16, and rsLoRA's."""
    d_out, d_in = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    parts = []
    for _ in range(draw(st.integers(least, 4))):
        r = draw(st.integers(1, 6))
        A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
        B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
        scaling = draw(st.sampled_from([2.0, 16 / r, 16 / r**0.5]))
        parts.append(Part(A, B, scaling, draw(st.integers(1, 30))))
    return parts


def factors_of(part: Part) -> LoraFactors:
    return LoraFactors(A=part.A, B=part.B, scaling=part.scaling)


def updates_of(parts: Sequence[Part]) -> list[ClientUpdate]:
    return [
        ClientUpdate(client_id=i, adapter=AdapterState(lora={"m": factors_of(part)}), num_examples=part.examples)
        for i, part in enumerate(parts)
    ]


def before(parts: Sequence[Part], more: int = 0, scaling: float = 0.5) -> AdapterState:
    """A fresh adapter of the largest rank among the replies, or a larger one, with B = 0."""
    rank = max(part.A.shape[0] for part in parts) + more
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank, parts[0].A.shape[1], generator=generator, dtype=torch.float64)
    B = torch.zeros(parts[0].B.shape[0], rank, dtype=torch.float64)
    return AdapterState(lora={"m": LoraFactors(A=A, B=B, scaling=scaling)})
