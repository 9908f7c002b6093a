"""Means of factors that methods share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, pad, to_fp32
from fedlora.adapters.means import Means, RankMeans
from fedlora.exchange import ClientUpdate

from ..base import ServerState
from .replies import arrivals


def effective_means(
    updates: Iterable[ClientUpdate], round: int, zero_pad: bool
) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    """Means of s_k A_k and of B_k by module, at the largest rank that arrived, and of the dense tensors.

    Args:
        updates: consumed as they arrive.
        round: for error messages.
        zero_pad: whether a row counts as zero for a client that lacks it, or not at all.

    Returns:
        Factors at the scaling of the first reply, and tensors.
    """
    means_a, means_b, dense = RankMeans(0, zero_pad), RankMeans(1, zero_pad), Means()
    scalings: dict[str, float] = {}
    for update in arrivals(updates, round):
        lora = update.adapter.lora
        means_a.add(
            {name: at_scaling(f, scalings.setdefault(name, f.scaling)) for name, f in lora.items()},
            update.num_examples,
            update.client_id,
        )
        means_b.add({name: f.B for name, f in lora.items()}, update.num_examples, update.client_id)
        dense.add(update.adapter.tensors, update.num_examples, update.client_id)
    of_b = means_b.values()
    means = {name: LoraFactors(A=a, B=of_b[name], scaling=scalings[name]) for name, a in means_a.values().items()}
    return means, dense.values


def at_scaling(factors: LoraFactors, scaling: float) -> Tensor:
    """A of the same update at another scaling; A itself, uncopied, where it is the same."""
    return factors.A if factors.scaling == scaling else (factors.scaling / scaling) * to_fp32(factors.A)


def padded_mean(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """The weighted means of pad(s_k A_k) and pad(B_k), scaling 1, of factors held together.

    Args:
        factors: one per client, of any ranks.
        weights: with sum 1.
    """
    first, rank = factors[0], max(f.rank for f in factors)
    A = to_fp32(first.A).new_zeros(rank, first.A.shape[1])
    B = to_fp32(first.B).new_zeros(first.B.shape[0], rank)
    for f, weight in zip(factors, weights, strict=True):
        A[: f.rank].add_(to_fp32(f.A), alpha=weight * f.scaling)
        B[:, : f.rank].add_(to_fp32(f.B), alpha=weight)
    return LoraFactors(A=A, B=B, scaling=1.0)


def averaged(state: ServerState, updates: Iterable[ClientUpdate], round: int, factor: Literal["A", "B"]) -> ServerState:
    """The state with one factor replaced by its mean over clients that hold the other in common, which is exact.

    Ranks below the largest are filled up with zeros, and the scales are taken into A.

    Args:
        state: that the round started from.
        updates: with this factor at least.
        round: for messages.
        factor: the one that was trained.
    """
    means, dense = RankMeans(0 if factor == "A" else 1, zero_pad=True), Means()
    for update in arrivals(updates, round):
        lora, server = update.adapter.lora, state.adapter.lora
        if factor == "A":
            means.add(
                {name: at_scaling(f, server[name].scaling) for name, f in lora.items()},
                update.num_examples,
                update.client_id,
            )
        else:
            means.add({name: f.B for name, f in lora.items()}, update.num_examples, update.client_id)
        dense.add(update.adapter.tensors, update.num_examples, update.client_id)
    lora = {name: _replaced(state.adapter.lora[name], factor, mean) for name, mean in means.values().items()}
    return state.updated(lora, dense.values)


def _replaced(before: LoraFactors, factor: Literal["A", "B"], mean: Tensor) -> LoraFactors:
    """The factors with a new A or B, with zeros where the mean has fewer ranks than the server.

    A row that would be zero in both factors has no gradient and would stay so for good; it keeps what it was,
    which adds nothing while the other factor is zero.
    """
    axis = 0 if factor == "A" else 1
    missing = before.rank - mean.shape[axis]
    if missing:
        old = (before.A if factor == "A" else before.B).narrow(axis, mean.shape[axis], missing).to(mean)
        other = (before.B if factor == "A" else before.A).narrow(1 - axis, mean.shape[axis], missing)
        alive = other.any(dim=axis).unsqueeze(1 - axis)
        mean = torch.cat([mean, torch.where(alive, torch.zeros_like(old), old)], dim=axis)
    return replace(before, A=mean) if factor == "A" else replace(before, B=mean)


def with_rank_restored(factors: LoraFactors, before: LoraFactors) -> LoraFactors:
    """The same update at the rank that the server held before, if that is larger.

    When no client of the largest rank was sampled, zero-padding would leave rows of A and columns of B that
    are both zero, and stay so for good, having no gradient. The rows of A are kept instead, with B = 0.
    """
    rank = factors.rank
    if rank >= before.rank:
        return factors
    kept = (before.scaling / factors.scaling) * before.A[rank:].to(factors.A)
    return LoraFactors(A=torch.cat([factors.A, kept]), B=pad(factors, before.rank).B, scaling=factors.scaling)
