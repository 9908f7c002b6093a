"""Singular value decompositions of products B @ A, batched over leading dimensions, without computing the products.

B: [..., d_out, R], A: [..., R, d_in]; results have at most k = min(R, d_out, d_in) components. Signs are fixed, so
that results are reproducible: in each column of U the entry of largest magnitude is positive.

Three functions give the same decomposition. `gram` is the fastest for R < min(d_out, d_in): two R x R Gram matrices
in fp64, one Cholesky factor and one symmetric eigenproblem, O((d_out + d_in) R^2 + R^3). Squaring costs half of
fp64's digits: singular values below 1e-7 of the product of the factors' norms are lost, but fp32 factors do not have
more digits anyway. If terms cancel, so that the product is smaller than that, `product_svd` takes `qr`, which
squares nothing. `dense` is for stacks with R >= min(d_out, d_in).

S is fp64. U and Vh are fp64 too, except that `gram` rounds those of fp32 factors to fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
# How many leading components are wanted: a number, 0 for all, or a function of all singular values S [..., k].
Rank = int | Callable[[Tensor], int]

# Singular values below this share of the largest have no correct digit after squaring in fp64.
_KNOWN = 1e-7
# If the largest singular value is below this share of |B||A|, squaring would cost digits of fp32.
_CANCELLED = 1e-5
# A sum of terms whose squares add up to more than this multiple of its own square is computed in fp64: the error of
# an fp32 sum would be more than four times the rounding of its result.
_LARGE_TERMS = 16.0
# Squares of numbers below this are those of fp32 numbers: factors of denormal numbers have larger weights.
_FITS = 1e60
# Singular values above this share of the Frobenius norm are far from the rounding of squares in fp64.
_CLEAR = 1e-6
# Numbers of a block of rows, and columns of a panel, in which Gram matrices are computed.
_BLOCK = 1 << 18
_PANEL = 80


def product_svd(B: Tensor, A: Tensor, rank: Rank = 0, whole: bool = False) -> Svd:
    """Thin SVD of B @ A by the fastest of the three functions that is accurate to fp32's digits.

    Args:
        B: [..., d_out, R].
        A: [..., R, d_in].
        rank: the number of leading components to return; 0: all min(R, d_out, d_in). A function is given all
            singular values, and returns it.
        whole: True if even the smallest components must be right, so that all together are B @ A up to fp64's
            rounding; `gram` is then not used.

    Returns:
        U [..., d_out, k], S [..., k] descending, Vh [..., k, d_in]. Components whose singular value is zero to working
        precision have S = 0 and zero vectors.
    """
    d_out, R, d_in = B.shape[-2], B.shape[-1], A.shape[-1]
    if min(d_out, d_in) <= R:
        return dense(B, A, rank)
    if whole:
        return qr(B, A, rank)
    found, sizes = _through_gram(B, A, rank)
    return qr(B, A, rank) if bool((found[1][..., 0] < _CANCELLED * sizes).any()) else found


def gram(B: Tensor, A: Tensor, rank: Rank = 0) -> Svd:
    """From G_b = B'B and G_a = AA' = LL': the eigenvectors w of L' G_b L = (singular values squared) give
    U = B L w / s and V' = w' L' G_b A / s^2. Nothing is inverted, so near-parallel rows of A do no harm."""
    return _through_gram(B, A, rank)[0]


def _through_gram(B: Tensor, A: Tensor, rank: Rank) -> tuple[Svd, Tensor]:
    """What `gram` returns, and |B||A| [...], the product of the factors' norms."""
    g_b, g_a = _columns_gram(B), _columns_gram(A.mT)
    # a row of A and its column of B may have very different sizes, but only the size of their product matters
    sizes_b, sizes_a = g_b.diagonal(dim1=-2, dim2=-1).sqrt(), g_a.diagonal(dim1=-2, dim2=-1).sqrt()
    alive = (sizes_b > 0) & (sizes_a > 0)
    balance = torch.where(alive, (sizes_a / sizes_b.where(alive, torch.ones_like(sizes_b))).sqrt(), 1.0)
    both = balance[..., :, None] * balance[..., None, :]
    g_b, g_a = g_b * both, g_a / both
    root, failed = torch.linalg.cholesky_ex(g_a)
    if bool(failed.any()):  # the rows of A are linearly dependent; any other square root of G_a will do
        values, vectors = torch.linalg.eigh(g_a)
        root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    right = g_b @ root
    values, w = torch.linalg.eigh(root.mT @ right)
    s, inverse = _roots(values.flip(-1))
    keep = _number(rank, s)
    s, inverse, w = s[..., :keep], inverse[..., :keep], w[..., -keep:].flip(-1)
    to_u = balance[..., :, None] * (root @ w) * inverse[..., None, :]
    to_v = balance.reciprocal()[..., :, None] * (right @ w) * inverse.square()[..., None, :]
    u = B @ to_u.float() if _fp32_serves(B, sizes_b, to_u) else B.double() @ to_u
    vh = to_v.mT.float() @ A if _fp32_serves(A, sizes_a, to_v) else to_v.mT @ A.double()
    if B.dtype != torch.float64:
        u, vh = u.float(), vh.float()
    return _signed(u, s, vh), torch.linalg.vector_norm(sizes_b, dim=-1) * torch.linalg.vector_norm(sizes_a, dim=-1)


def _columns_gram(x: Tensor) -> Tensor:
    """X'X [..., R, R] in fp64 for X [..., d, R] of any number format.

    Neither a whole copy of X in fp64 is made, nor most of the lower triangle computed: blocks of rows that fit into a
    processor's cache are widened, and multiplied panel by panel of columns.
    """
    d, R = x.shape[-2:]
    whole = torch.zeros(*x.shape[:-2], R, R, dtype=torch.float64, device=x.device)
    step = max(_BLOCK * d // max(x.numel(), 1), 1)
    panels = [(begin, min(begin + _PANEL, R)) for begin in range(0, R, _PANEL)]
    for row in range(0, d, step):
        block = x[..., row : row + step, :].double()
        for begin, end in panels:
            whole[..., begin:end, begin:] += block[..., begin:end].mT @ block[..., begin:]
    for begin, end in panels:
        whole[..., end:, begin:end] = whole[..., begin:end, end:].mT
    return whole


def _fp32_serves(factor: Tensor, sizes: Tensor, weights: Tensor) -> bool:
    """Whether sums over the columns of B, or the rows of A, that have norm 1 or 0 keep fp32's digits in fp32.

    Args:
        factor: B or A.
        sizes: the norms of its columns or rows, [..., R].
        weights: of the sums, [..., R, k].
    """
    if factor.dtype != torch.float32:
        return False
    squares = weights.square()
    return bool(((sizes.square()[..., None, :] @ squares <= _LARGE_TERMS).all()) & (squares < _FITS).all())


def singular_values(g_b: Tensor, g_a: Tensor) -> Tensor:
    """The singular values of B @ A from its Gram matrices B'B and AA' [..., R, R], largest first, fp64 [..., R].

    Values below 1e-8 of the product of the factors' norms are only rounding.
    """
    values, vectors = torch.linalg.eigh(g_a)
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return torch.linalg.eigvalsh(root.mT @ g_b @ root).clamp(min=0.0).sqrt().flip(-1)


def qr(B: Tensor, A: Tensor, rank: Rank = 0) -> Svd:
    """QR of B and of A', then the SVD of the R x R core, all in fp64: slower, and accurate where terms cancel."""
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    keep = _number(rank, s)
    return _signed(q_b @ u[..., :keep], s[..., :keep], vh[..., :keep, :] @ q_a.mT)


def dense(B: Tensor, A: Tensor, rank: Rank = 0) -> Svd:
    """SVD from the product itself, in fp64, and the eigenvectors of its smaller Gram matrix; for R >= min(d_out, d_in).

    The product is projected on the eigenvectors. These are orthonormal however many digits squaring has cost, so that
    all components together are the product up to fp64's rounding. Vectors that belong to singular values below 1e-8
    of the largest are mixed with each other.
    """
    return of_matrix(B.double() @ A.double(), rank)


def of_matrix(matrix: Tensor, rank: Rank = 0) -> Svd:
    """SVD of a matrix [..., d_out, d_in], as in `dense`."""
    product = matrix.double()
    if product.shape[-2] <= product.shape[-1]:
        u = _leading_eigenvectors(_columns_gram(product.mT), rank)
        s, vh = _unit_rows(u.mT @ product)
        return _signed(u * (s > 0)[..., None, :], s, vh)
    v = _leading_eigenvectors(_columns_gram(product), rank)
    s, u = _unit_rows((product @ v).mT)
    return _signed(u.mT, s, (v * (s > 0)[..., None, :]).mT)


def surely_full_rank(matrix: Tensor) -> bool:
    """Whether all singular values of a matrix [d_out, d_in] are above 1e-6 of its Frobenius norm.

    One Cholesky factorization of the smaller Gram matrix, minus that limit, says it without any eigenvectors.
    """
    squared = _columns_gram(matrix if matrix.shape[0] > matrix.shape[1] else matrix.mT)
    shift = _CLEAR**2 * squared.diagonal().sum()
    squared.diagonal().sub_(shift)
    return bool(shift > 0) and not bool(torch.linalg.cholesky_ex(squared).info)


def ldu(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first part of W = P L D U, in fp64: columns of P L [d_out, k], D [k], rows of U [k, d_in].

    Args:
        matrix: W, [d_out, d_in].
        rank: the wanted k; it is at most min(d_out, d_in).

    L and U have ones on their diagonals. Where D is 0, U has a 0 there, and D counts as 1.
    """
    permutation, lower, upper = torch.linalg.lu(matrix.double())
    pivots = upper.diagonal()[:rank]
    pivots = pivots.where(pivots != 0, torch.ones_like(pivots))
    known = len(pivots)
    return permutation @ lower[:, :known], pivots, upper[:known] / pivots[:, None]


def _leading_eigenvectors(squared: Tensor, rank: Rank) -> Tensor:
    """The leading eigenvectors of a matrix whose eigenvalues are squared singular values; eigh has them in reverse."""
    values, vectors = torch.linalg.eigh(squared)
    keep = _number(rank, values.flip(-1).clamp(min=0.0).sqrt())
    return vectors[..., -keep:].flip(-1)


def _number(rank: Rank, s: Tensor) -> int:
    """How many components to return, where s [..., k] has all singular values."""
    most = s.shape[-1]
    return min((rank if isinstance(rank, int) else rank(s)) or most, most)


def _roots(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and their inverses; both are zero where squaring has left no correct digit."""
    s = squares.clamp(min=0.0).sqrt()
    known = (s > _KNOWN * s[..., :1]) & (s > 0)
    return s.where(known, torch.zeros_like(s)), torch.where(known, 1.0 / s.where(known, torch.ones_like(s)), 0.0)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the rows, and the rows divided by their norms; rows of zeros stay zero."""
    s = torch.linalg.vector_norm(rows, dim=-1)
    return s, rows / s.where(s > 0, torch.ones_like(s))[..., :, None]


def _signed(u: Tensor, s: Tensor, vh: Tensor) -> Svd:
    """The same decomposition with the largest entry of each column of U positive; U and Vh are changed in place."""
    if u.numel():
        sign = torch.where(u.amin(dim=-2, keepdim=True) + u.amax(dim=-2, keepdim=True) < 0, -1.0, 1.0).to(u.dtype)
        u.mul_(sign)
        vh.mul_(sign.mT)
    return u, s, vh
