"""LoRA adapters as values, and their algebra. Nothing here forms a d_out x d_in matrix but `delta`.

Notation: an adapted module's update is dW = scaling * B @ A, A: [r, d_in], B: [d_out, r]. Results are fp32,
or fp64 where the factors are: narrower ones (bf16) are widened before they are scaled or added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedlora.common.errors import AdapterError

from . import lowrank
from .state import AdapterState, LoraFactors, to_fp32

# Numbers of a batch of equal modules: large enough that Python's loop does not show, small beside a model.
_AT_ONCE = 1 << 20
_ROUNDING = torch.finfo(torch.float32).eps / 2


def delta(factors: LoraFactors) -> Tensor:
    """The dense update `scaling * B @ A`, [d_out, d_in]. For tests and merging into an fp32 base only."""
    return factors.scaling * (factors.B @ factors.down)


def norm(factors: LoraFactors) -> float:
    """Frobenius norm of dW through Gram matrices: |dW|^2 = s^2 tr(B'B AA'), in fp64, O(d r^2)."""
    return max(inner(factors, factors), 0.0) ** 0.5


def inner(left: LoraFactors, right: LoraFactors) -> float:
    """Frobenius inner product of two updates, s_l s_r tr((B_l'B_r)(A_r A_l')), in fp64, O(d r_l r_r)."""
    across_out = left.B.double().T @ right.B.double()
    across_in = left.down.double() @ right.down.double().T
    return left.scaling * right.scaling * float((across_out * across_in).sum())


def initial(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Callable[[str], int] | Mapping[str, int],
    scalings: Callable[[str], float] | Mapping[str, float],
    generator: torch.Generator,
) -> AdapterState:
    """A fresh adapter with dW = 0: A from U(-1/sqrt(d_in), 1/sqrt(d_in)), which is PEFT's kaiming-uniform; B = 0.

    Args:
        shapes: module name -> (d_out, d_in), as a Linear's weight has it.
        ranks: the rank of a module by its name.
        scalings: the scaling of a module by its name.
        generator: what A is drawn from, in sorted order of the names, so that the mapping's order is of no matter.
    """
    rank_of = ranks if callable(ranks) else ranks.__getitem__
    scaling_of = scalings if callable(scalings) else scalings.__getitem__
    lora: dict[str, LoraFactors] = {}
    for name in sorted(shapes):
        d_out, d_in = shapes[name]
        A = uniform((rank_of(name), d_in), generator)
        B = torch.zeros(d_out, rank_of(name), device=generator.device)
        lora[name] = LoraFactors(A=A, B=B, scaling=scaling_of(name))
    return AdapterState(lora=lora)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws from U(-1/sqrt(d), 1/sqrt(d)), where d is the last dimension: LoRA's A, as PEFT draws it."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)


def count_numbers(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """How many numbers the factors A and B of these modules have.

    Args:
        ranks: module -> rank.
        shapes: module -> (d_out, d_in), of these modules and maybe more.
    """
    return sum(rank * sum(shapes[module]) for module, rank in ranks.items())


@dataclass(frozen=True)
class Sum:
    """`sum_k w_k dW_k` of one module, not yet computed.

    Args:
        parts: at least one, of any ranks.
        weights: w_k of each.
    """

    parts: Sequence[LoraFactors]
    weights: Sequence[float]

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the result: fp64 if a factor is fp64, else fp32."""
        wide = any(factor.dtype == torch.float64 for p in self.parts for factor in (p.A, p.B))
        return torch.float64 if wide else torch.float32


def stack(parts: Sequence[LoraFactors], weights: Sequence[float] | None = None) -> LoraFactors:
    """Factors whose product is exactly `sum_k w_k dW_k`: B = [B_1|...], A = [w_1 s_1 A_1; ...], scaling 1.

    FLoRA (https://arxiv.org/abs/2409.05976), with the scale folded into A. The weights are taken
    as they are, so that differences are stacks too: `stack([x, y], [1.0, -1.0])`.
    """
    w = [1.0] * len(parts) if weights is None else weights
    B = torch.cat([to_fp32(p.B) for p in parts], dim=1)
    return LoraFactors(A=_scaled_rows(parts, w), B=B, scaling=1.0)


def _scaled_rows(parts: Sequence[LoraFactors], weights: Sequence[float], out: Tensor | None = None) -> Tensor:
    """A = [w_1 s_1 A_1; ...], written to `out` if it is given."""
    A = torch.cat([to_fp32(p.down) for p in parts], out=out)
    scales = tuple(weight * p.scaling for weight, p in zip(weights, parts, strict=True))
    if any(scale != 1 for scale in scales):
        A.mul_(_row_scales(scales, tuple(p.rank for p in parts), A.dtype, A.device))
    return A


@lru_cache(maxsize=64)
def _row_scales(scales: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A column with the k-th scale in as many rows as the k-th rank, [sum(ranks), 1]; most modules have the same."""
    rows = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
    return torch.tensor(rows, dtype=dtype, device=device)[:, None]


def concatenate(parts: Sequence[AdapterState]) -> AdapterState:
    """The sum of frozen updates as one adapter, by stacking alone: the same parts give the same bits."""
    names = dict.fromkeys(name for part in parts for name in part.lora)
    return AdapterState(lora={name: stack([p.lora[name] for p in parts if name in p.lora]) for name in names})


def relative_error(aggregate: Mapping[str, LoraFactors], ideal: Mapping[str, LoraFactors]) -> float:
    """`|aggregate - ideal|_F / |ideal|_F`, all modules together; a module that `aggregate` lacks counts as zero.

    The difference is a stack, whose norm comes from QR: a difference of squared norms would drown in
    rounding below 1e-8.

    Args:
        aggregate: what the server made of the replies, by module.
        ideal: what exact aggregation of the same replies gives, `sum_k p_k dW_k`, by module.
    """
    difference = reference = 0.0
    for name, exact in ideal.items():
        missed = stack([aggregate[name], exact], [1.0, -1.0]) if name in aggregate else exact
        difference += _core_norm(missed) ** 2
        reference += _core_norm(exact) ** 2
    if reference == 0:
        return 0.0 if difference == 0 else float("inf")
    return (difference / reference) ** 0.5


def _core_norm(factors: LoraFactors) -> float:
    """|dW|_F as the norm of the core `R_b R_a'` of two QRs, in fp64: accurate where the factors' terms cancel."""
    r_b = torch.linalg.qr(factors.B.double(), mode="r").R
    r_a = torch.linalg.qr(factors.down.double().T, mode="r").R
    return abs(factors.scaling) * float(torch.linalg.norm(r_b @ r_a.T))


def svd_each(lora: Mapping[str, LoraFactors], rank: lowrank.Rank = 0, whole: bool = False) -> dict[str, lowrank.Svd]:
    """The thin SVD of every module's dW; see `svd_of_sums`.

    Args:
        lora: module name -> factors, of any ranks.
        rank: as for `svd_of_sums`.
        whole: as for `svd_of_sums`.
    """
    return svd_of_sums({name: Sum([f], [1.0]) for name, f in lora.items()}, rank, whole)


def svd_of_sums(sums: Mapping[str, Sum], rank: lowrank.Rank = 0, whole: bool = False) -> dict[str, lowrank.Svd]:
    """The thin SVD of every module's sum: `U [d_out, k], S [k], Vh [k, d_in]`, k = min(R, d_out, d_in).

    R is the sum of the parts' ranks. Modules of equal shapes go through `lowrank.product_svd` together, and only their
    parts are stacked at that time.

    Args:
        sums: module name -> sum of updates of any ranks.
        rank: the number of leading components to return, at most; 0: all. A function is given all singular values of
            one module, [k], and returns this module's number.
        whole: as for `lowrank.product_svd`; slower, and no component is lost for being small.

    Returns:
        S in fp64; U and Vh in fp32 or fp64, as `lowrank` says.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, total in sums.items():
        first = total.parts[0]
        key = first.B.shape[0], sum(p.rank for p in total.parts), first.A.shape[1], total.dtype, first.A.device
        alike.setdefault(key, []).append(name)
    found: dict[str, lowrank.Svd] = {}
    for shape, group in alike.items():
        d_out, R, d_in, dtype, device = shape
        for names in in_chunks(group, (d_out + d_in) * R):
            B = torch.empty(len(names), d_out, R, dtype=dtype, device=device)
            A = torch.empty(len(names), R, d_in, dtype=dtype, device=device)
            for i, name in enumerate(names):
                torch.cat([to_fp32(p.B) for p in sums[name].parts], dim=1, out=B[i])
                _scaled_rows(sums[name].parts, sums[name].weights, out=A[i])
            found |= _svd_of_batch(names, B, A, rank, whole)
    return {name: found[name] for name in sums}


def _svd_of_batch(
    names: Sequence[str], B: Tensor, A: Tensor, rank: lowrank.Rank, whole: bool
) -> dict[str, lowrank.Svd]:
    """The SVD of every B @ A of a batch, by its name, each with its own number of components."""
    if isinstance(rank, int):
        u, s, vh = lowrank.product_svd(B, A, rank, whole)
        return {name: (u[i], s[i], vh[i]) for i, name in enumerate(names)}
    numbers: list[int] = []

    def most(s: Tensor) -> int:
        numbers[:] = [rank(row) for row in s]
        return max(numbers)

    u, s, vh = lowrank.product_svd(B, A, most, whole)
    return {name: (u[i, :, :k], s[i, :k], vh[i, :k]) for i, (name, k) in enumerate(zip(names, numbers, strict=True))}


def in_chunks(names: Sequence[str], numbers: int) -> Iterator[Sequence[str]]:
    """Equal modules in groups that are computed together, each of so many numbers in its factors."""
    size = max(1, _AT_ONCE // max(numbers, 1))
    for begin in range(0, len(names), size):
        yield names[begin : begin + size]


def leading(svd: lowrank.Svd, rank: int, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> LoraFactors:
    """The first `rank` components of an SVD as factors, split evenly: B = U sqrt(S/s), A = sqrt(S/s) Vh.

    Args:
        svd: as `svd_each` gives it.
        rank: components to keep; fewer come back where there are fewer.
        scaling: the receiver's own scaling s, divided out once.
        dtype: of the factors.
    """
    u, s, vh = svd
    root = (s[:rank] / scaling).sqrt().to(u.dtype)
    return LoraFactors(A=(root[:, None] * vh[:rank]).to(dtype), B=(u[:, :rank] * root).to(dtype), scaling=scaling)


def truncate(factors: LoraFactors, rank: int, scaling: float = 1.0) -> LoraFactors:
    """The best approximation of dW of at most this rank; see `leading` for its form.

    Args:
        factors: of any rank.
        rank: the rank to keep; fewer rows come back where dW has fewer (see `compress` for the numerical rank).
        scaling: the receiver's own scaling, divided out once.
    """
    return leading(svd_each({"": factors}, rank)[""], rank, scaling, to_fp32(factors.A).dtype)


def compress(lora: Mapping[str, LoraFactors], max_rank: int = 0) -> dict[str, LoraFactors]:
    """The same updates at the smallest rank (at least 1) that keeps them to fp32's rounding, or at `max_rank`.

    What is dropped has a Frobenius norm of at most 2^-24 of the whole update's, the rounding of one fp32 number. An
    update of full rank is kept as the matrix itself, beside an identity: no factors of it are smaller, and it needs no
    SVD.

    Args:
        lora: module name -> factors, of any ranks.
        max_rank: the largest rank that is kept, whatever is lost by it; 0: no such limit.
    """
    small = {name: full for name, f in lora.items() if (full := _of_full_rank(f, max_rank)) is not None}
    rest = {name: f for name, f in lora.items() if name not in small}
    for name, svd in svd_each(rest, whole=True).items():
        _, s, _ = svd
        tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of what is lost without component i and those after it
        rank = max(1, int((tails > _ROUNDING * tails[0]).sum()))
        small[name] = leading(svd, min(rank, max_rank) if max_rank else rank, dtype=to_fp32(lora[name].A).dtype)
    return {name: small[name] for name in lora}


def _of_full_rank(factors: LoraFactors, max_rank: int) -> LoraFactors | None:
    """dW and an identity as factors of the smallest rank that can hold it; None if a smaller rank may do, or must."""
    d_out, d_in = factors.B.shape[0], factors.A.shape[1]
    size = min(d_out, d_in)
    if factors.rank < size or 0 < max_rank < size:
        return None
    product = factors.scaling * (factors.B.double() @ factors.down.double())
    if not lowrank.surely_full_rank(product):
        return None
    whole = product.to(to_fp32(factors.A).dtype)
    one = torch.eye(size, dtype=whole.dtype, device=whole.device)
    A, B = (whole, one) if d_out <= d_in else (one, whole)
    return LoraFactors(A=A, B=B, scaling=1.0)


def pruned_rank(rank: int, gamma: float) -> int:
    """The rank that HetLoRA's pruning leaves: `ceil(gamma rank)`, at least 1; all of it at a gamma of 0, never.

    The product's rounding in fp64 is no row: 0.55 of 20 is 11.
    """
    return max(1, math.ceil(gamma * rank - 1e-9)) if gamma else rank


def pad(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same update at a larger rank: zero rows below A, zero columns right of B, both around a core."""
    extra = rank - factors.rank
    if extra < 0:
        raise AdapterError(f"cannot pad rank {factors.rank} to {rank}; truncate or slice it instead")
    return LoraFactors(
        A=torch.nn.functional.pad(factors.A, (0, 0, 0, extra)),
        B=torch.nn.functional.pad(factors.B, (0, extra)),
        scaling=factors.scaling,
        R=None if factors.R is None else torch.nn.functional.pad(factors.R, (0, extra, 0, extra)),
    )


def first_ranks(factors: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    """The first `rank` rows of A and columns of B at the receiver's scaling; the effective scale moves into A.

    Raises:
        AdapterError: the factors have fewer rows.
    """
    if rank > factors.rank:
        raise AdapterError(f"cannot take {rank} rows of factors of rank {factors.rank}; pad them first")
    return LoraFactors(
        A=(factors.scaling / scaling) * to_fp32(factors.A[:rank]),
        B=to_fp32(factors.B[:, :rank]).clone(),
        scaling=scaling,
        R=None if factors.R is None else to_fp32(factors.R[:rank, :rank]).clone(),
    )


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
    for name, factors in adapter.lora.items():
        s = _singular(factors)
        s = s[(s > 1e-7 * s[:1]) & (s > 0)]
        found[name] = s[: most or len(s)].tolist()
    return found


def _singular(factors: LoraFactors) -> Tensor:
    """Through Gram matrices, or the matrix itself where the factors outgrow it; fp64, descending."""
    b, a = factors.B.double(), factors.down.double()
    if factors.rank >= min(b.shape[0], a.shape[1]):
        return torch.linalg.svdvals(delta(LoraFactors(A=a, B=b, scaling=factors.scaling)))
    return abs(factors.scaling) * lowrank.singular_values(b.mT @ b, a @ a.mT)


def whole_svd(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of dW in fp64 with orthonormal vectors for S = 0 as well, in the span of B's columns and of A's rows.

    Returns:
        U [d_out, min(d_out, r)], S [min(d_out, d_in, r)], V' [min(d_in, r), d_in]. The largest entry of each of the
        first rows of V' is positive, so that results reproduce.
    """
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.down.double().T)
    u, s, vh = torch.linalg.svd(factors.scaling * (r_b @ r_a.T))
    u, vh = q_b @ u, vh @ q_a.T
    paired = slice(0, len(s))
    peak = vh[paired].gather(1, vh[paired].abs().argmax(dim=1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(vh)
    vh[paired] *= sign
    u[:, paired] *= sign.T
    return u, s, vh
