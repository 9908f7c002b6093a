"""Means of factors, for several methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, first_ranks, pad, to_fp32
from fedlora.adapters.means import Means, RankMeans
from fedlora.exchange import ClientUpdate

from ..base import ServerState
from .replies import arrivals


def effective_means(
    updates: Iterable[ClientUpdate], number: int, zero_pad: bool
) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    """The means of s_k A_k and of B_k for each module, at the largest rank of all replies; means of other tensors.

    Args:
        updates: the replies, which are read as they arrive.
        number: number of the round, for error messages.
        zero_pad: True if a row that a client lacks counts as zero in the mean; False if the mean of a row is taken
            over the clients that have it.

    Returns:
        The factors of each module, at the scaling of its first reply, and the means of the tensors trained in full.
    """
    means_a, means_b, dense = RankMeans(0, zero_pad), RankMeans(1, zero_pad), Means()
    scalings: dict[str, float] = {}
    for update in arrivals(updates, number):
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


def row_means(state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
    """The state with each row of A and column of B replaced by its mean over the clients that have it.

    A module, row or tensor that no reply contains keeps its value. A_k is multiplied so that all clients have the
    server's scaling.

    Args:
        state: the state from which the round started.
        updates: the replies, which are read as they arrive.
        number: number of the round, for error messages.
    """
    means, dense = effective_means(updates, number, zero_pad=False)
    lora = dict[str, LoraFactors]()
    for name, factors in means.items():
        before = state.adapter.lora.get(name, factors)
        new = first_ranks(factors, factors.rank, before.scaling)
        lora[name] = LoraFactors(
            A=torch.cat([new.A, before.A[new.rank :].to(new.A)]),
            B=torch.cat([new.B, before.B[:, new.rank :].to(new.B)], dim=1),
            scaling=before.scaling,
        )
    return state.updated(lora, dense)


def at_scaling(factors: LoraFactors, scaling: float) -> Tensor:
    """A, multiplied so that the update stays the same at another scaling; A itself, not a copy, at its own scaling."""
    return factors.A if factors.scaling == scaling else (factors.scaling / scaling) * to_fp32(factors.A)


def padded_mean(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """The weighted means of pad(s_k A_k) and pad(B_k), where pad fills up to the largest rank with zeros; scaling 1.

    Args:
        factors: the factors of each client, of any ranks.
        weights: the weight of each client; their sum is 1.
    """
    first, rank = factors[0], max(f.rank for f in factors)
    A = to_fp32(first.A).new_zeros(rank, first.A.shape[1])
    B = to_fp32(first.B).new_zeros(first.B.shape[0], rank)
    for f, weight in zip(factors, weights, strict=True):
        A[: f.rank].add_(to_fp32(f.A), alpha=weight * f.scaling)
        B[:, : f.rank].add_(to_fp32(f.B), alpha=weight)
    return LoraFactors(A=A, B=B, scaling=1.0)


def averaged(
    state: ServerState, updates: Iterable[ClientUpdate], number: int, factor: Literal["A", "B"]
) -> ServerState:
    """The state with one factor replaced by its mean over the clients.

    The result is exact, since the other factor is the same for all clients. Smaller ranks are filled up with zeros,
    and A is multiplied so that all clients have the server's scaling.

    Args:
        state: the state from which the round started.
        updates: the replies, each with at least this factor.
        number: number of the round, for error messages.
        factor: the factor that was trained.
    """
    means, dense = RankMeans(0 if factor == "A" else 1, zero_pad=True), Means()
    for update in arrivals(updates, number):
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
    """The factors with the mean as their new A or B; ranks that the mean lacks are filled up with zeros.

    A row that is zero in both factors would have no gradient and could never be trained. Such a row keeps its value
    instead, which adds nothing to the update while the other factor is zero.
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
    """The same update at the server's earlier rank, if that is larger than the rank of `factors`.

    If no client of the largest rank replied, zero-padding would leave rows of A and columns of B that are both zero.
    They would have no gradient and could never be trained. The earlier rows of A are kept instead, with B = 0.

    Args:
        factors: the new factors of a module.
        before: the server's factors of that module before the round.
    """
    rank = factors.rank
    if rank >= before.rank:
        return factors
    kept = (before.scaling / factors.scaling) * before.A[rank:].to(factors.A)
    return LoraFactors(A=torch.cat([factors.A, kept]), B=pad(factors, before.rank).B, scaling=factors.scaling)
