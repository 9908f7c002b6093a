"""FedAvg over factors of unequal ranks, filled up with zeros to the largest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks, to_fp32
from fedlora.adapters.means import Means, RankMeans
from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy, regrown
from ..tools.replies import arrivals


@dataclass(frozen=True)
class FedAvgZeropad(Strategy):
    """`A = sum_k p_k pad(s_k A_k)`, `B = sum_k p_k pad(B_k)`, with zeros in the rows and columns that client k lacks.

    The baseline for unequal ranks in Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with
    Heterogeneous Low-Rank Adaptations", https://arxiv.org/abs/2409.05976. Besides what `fedavg` misses, the zeros
    shrink every row that not all clients have, in A and in B: its product with the square of the share that has it.
    Here A_k carries the client's scaling, so that unequal scalings are averaged as the updates they stand for.
    Means run as replies arrive, so memory is that of one reply.
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The padded means; a module or dense tensor that no reply has stays as it was."""
        means, dense = effective_means(updates, round, zero_pad=True)
        lora = dict(state.adapter.lora)
        for name, factors in means.items():
            before = lora.get(name, factors)
            lora[name] = regrown(first_ranks(factors, factors.rank, before.scaling), before)
        return replace(state, adapter=AdapterState(lora=lora, tensors={**state.adapter.tensors, **dense}))


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
