"""Terms of a client's loss, which are added as gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedlora.adapters import pruned_rank
from fedlora.models.trainable import Pair


def add_proximal(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term mu/2 |theta - theta_start|^2 (https://arxiv.org/abs/1812.06127, eq. 2)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def add_tail_penalty(pairs: Sequence[Pair], gamma: float, weight: float) -> None:
    """Add the gradient of `weight * sum |B tail|_F |A tail|_F`, which shrinks the last ranks (HetLoRA's self-pruning).

    Cho et al. 2024, https://arxiv.org/abs/2401.06432, Section 4.

    Args:
        pairs: the factors of each module.
        gamma: the tail begins after row ceil(gamma r), but not before the second row.
        weight: weight of the term.
    """
    for A, B in ((pair.A, pair.B) for pair in pairs):
        keep = pruned_rank(A.shape[0], gamma)
        a, b = A.detach()[keep:], B.detach()[:, keep:]
        size_a, size_b = a.norm(), b.norm()
        if A.grad is not None and float(size_a) > 0:
            A.grad[keep:].add_(a * (weight * size_b / size_a))
        if B.grad is not None and float(size_b) > 0:
            B.grad[:, keep:].add_(b * (weight * size_a / size_b))
