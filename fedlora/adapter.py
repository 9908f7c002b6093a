"""LoRA adapters as values, and their algebra. Nothing here forms a d_out x d_in matrix but `delta`.

Notation: an adapted module's update is dW = scaling * B @ A, A: [r, d_in], B: [d_out, r].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from fedlora.errors import AdapterError


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's factors: dW = scaling * B @ A.

    Args:
        A: down projection, [r, d_in].
        B: up projection, [d_out, r].
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732).
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class AdapterState:
    """Everything that is trained: factors by base-model module name, and tensors trained in full.

    Args:
        lora: base-model module name -> factors.
        dense: parameter name -> tensor trained in full (a classification head), averaged by every strategy.
    """

    lora: Mapping[str, LoraFactors] = field(default_factory=lambda: MappingProxyType({}))
    dense: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


def delta(factors: LoraFactors) -> Tensor:
    """The dense update `scaling * B @ A`, [d_out, d_in]. For tests and merging into an fp32 base only."""
    return factors.scaling * (factors.B @ factors.A)


def norm(factors: LoraFactors) -> float:
    """Frobenius norm of dW through Gram matrices: |dW|^2 = s^2 tr(B'B AA'), in fp64, O(d r^2)."""
    return max(inner(factors, factors), 0.0) ** 0.5


def inner(left: LoraFactors, right: LoraFactors) -> float:
    """Frobenius inner product of two updates, s_l s_r tr((B_l'B_r)(A_r A_l')), in fp64, O(d r_l r_r)."""
    across_out = left.B.double().T @ right.B.double()
    across_in = left.A.double() @ right.A.double().T
    return left.scaling * right.scaling * float((across_out * across_in).sum())


def mean(parts: Sequence[LoraFactors], weights: Sequence[float] | None = None) -> LoraFactors:
    """The weighted means of A and of B (not of the products), as in FedIT.

    Args:
        parts: factors of equal shapes and scaling.
        weights: one non-negative weight each, of any sum above zero; equal when left out.

    Raises:
        AdapterError: shapes or scalings differ.
    """
    share = normalized(len(parts) if weights is None else weights)
    first = parts[0]
    for part in parts:
        if part.A.shape != first.A.shape or part.B.shape != first.B.shape or part.scaling != first.scaling:
            raise AdapterError(
                f"mean of factors needs equal ranks and scalings, got ranks {[p.rank for p in parts]} and "
                f"scalings {[p.scaling for p in parts]}; pad them to one rank, or stack them"
            )
    return LoraFactors(
        A=weighted_sum([p.A for p in parts], share), B=weighted_sum([p.B for p in parts], share), scaling=first.scaling
    )


def stack(parts: Sequence[LoraFactors], weights: Sequence[float] | None = None) -> LoraFactors:
    """Factors whose product is exactly `sum_k w_k dW_k`: B = [B_1|...], A = [w_1 s_1 A_1; ...], scaling 1.

    FLoRA (https://arxiv.org/abs/2409.05976, eq. 6), with the scale folded into A. The weights are taken
    as they are, so that differences are stacks too: `stack([x, y], [1.0, -1.0])`.
    """
    w = [1.0] * len(parts) if weights is None else weights
    return LoraFactors(
        A=torch.cat([(wk * p.scaling) * p.A for wk, p in zip(w, parts, strict=True)]),
        B=torch.cat([p.B for p in parts], dim=1),
        scaling=1.0,
    )


def qr_svd(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of dW from its factors: `U [d_out, k], S [k], Vh [k, d_in]`, k = min(R, d_out, d_in).

    QR of B and of A', then the SVD of the R x R core, in fp64: O((d_out + d_in) R^2 + R^3). Signs are fixed
    (the entry of largest magnitude in each column of U is positive), so that results reproduce.
    """
    b, a = factors.B.double(), factors.A.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(factors.scaling * (r_b @ r_a.T), full_matrices=False)
    u, vh = q_b @ u, vh @ q_a.T
    peak = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    dtype = factors.A.dtype
    return (u * sign).to(dtype), s.to(dtype), (vh * sign.T).to(dtype)


def truncate(factors: LoraFactors, rank: int, scaling: float = 1.0) -> LoraFactors:
    """The best approximation of dW of at most this rank, split evenly: B = U sqrt(S/s), A = sqrt(S/s) Vh.

    Args:
        factors: of any rank.
        rank: the rank to keep; fewer rows come back where dW has fewer (see `compress` for the numerical rank).
        scaling: the receiver's own scaling, divided out once.
    """
    u, s, vh = qr_svd(factors)
    root = (s[:rank] / scaling).sqrt()
    return LoraFactors(A=root[:, None] * vh[:rank], B=u[:, :rank] * root, scaling=scaling)


def compress(factors: LoraFactors, max_rank: int = 0) -> LoraFactors:
    """The same update at its numerical rank in fp32 (at least 1), or at `max_rank` if that is lower and not 0."""
    u, s, vh = qr_svd(factors)
    tolerance = float(s[0]) * max(u.shape[0], vh.shape[1]) * torch.finfo(torch.float32).eps
    rank = max(1, int((s > tolerance).sum()))
    rank = min(rank, max_rank) if max_rank else rank
    root = s[:rank].sqrt()
    return LoraFactors(A=root[:, None] * vh[:rank], B=u[:, :rank] * root, scaling=1.0)


def pad(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same update at a larger rank: zero rows below A, zero columns right of B."""
    extra = rank - factors.rank
    if extra < 0:
        raise AdapterError(f"cannot pad rank {factors.rank} to {rank}; truncate or slice it instead")
    return LoraFactors(
        A=torch.nn.functional.pad(factors.A, (0, 0, 0, extra)),
        B=torch.nn.functional.pad(factors.B, (0, extra)),
        scaling=factors.scaling,
    )


def first_ranks(factors: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    """The first `rank` rows of A and columns of B at the receiver's scaling; the effective scale moves into A."""
    return LoraFactors(
        A=(factors.scaling / scaling) * factors.A[:rank], B=factors.B[:, :rank].clone(), scaling=scaling
    )


def normalized(weights: int | Sequence[float]) -> list[float]:
    """Weights that sum to 1; a count stands for that many equal ones."""
    w = [1.0] * weights if isinstance(weights, int) else [float(x) for x in weights]
    total = sum(w)
    if not w or total <= 0:
        raise AdapterError(f"weights must be non-negative with a sum above zero, got {w}")
    return [x / total for x in w]


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """`sum_k w_k t_k`, accumulated in fp32 or wider."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        total = wide * weight if total is None else total.add_(wide, alpha=weight)
    if total is None:
        raise AdapterError("a weighted sum needs at least one tensor")
    return total
