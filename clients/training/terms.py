"""Terms that are added to a client's loss, as gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedlora.adapters import pruned_rank


def add_proximal(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Adds the gradient of FedProx's term mu/2 |theta - theta_start|^2 (https://arxiv.org/abs/1812.06127, eq. 2)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def add_tail_penalty(
    factors: Sequence[tuple[nn.Parameter, nn.Parameter]], gamma: float, weight: float, rank_of_b: int = 1
) -> None:
    """Adds the gradient of `weight * sum |B tail|_F |A tail|_F`, so that the last ranks fade (HetLoRA's self-pruning).

    Cho et al. 2024, https://arxiv.org/abs/2401.06432, Section 4.

    Args:
        factors: A [r, d_in] and B [d_out, r] of each module.
        gamma: the tail begins at row ceil(gamma r), and at the second row at the earliest.
        weight: of the term.
        rank_of_b: 0 where the factors hold B' [r, d_out].
    """
    for A, B in factors:
        keep = pruned_rank(A.shape[0], gamma)
        tail = A.shape[0] - keep
        a, b = A.detach()[keep:], B.detach().narrow(rank_of_b, keep, tail)
        size_a, size_b = a.norm(), b.norm()
        if A.grad is not None and float(size_a) > 0:
            A.grad[keep:].add_(a * (weight * size_b / size_a))
        if B.grad is not None and float(size_b) > 0:
            B.grad.narrow(rank_of_b, keep, tail).add_(b * (weight * size_a / size_b))
