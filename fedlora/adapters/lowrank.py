"""Singular value decompositions of products B @ A, batched over leading dimensions, without computing the products.

B: [..., d_out, R], A: [..., R, d_in]; results have at most k = min(R, d_out, d_in) components, in fp64. Signs
are fixed, so that results are reproducible: in each column of U the entry of largest magnitude is positive.

Three functions give the same decomposition. `gram` is the fastest for R < min(d_out, d_in): two R x R Gram matrices
in fp64, one Cholesky factor and one symmetric eigenproblem, O((d_out + d_in) R^2 + R^3). Squaring costs half of
fp64's digits: singular values below 1e-7 of the product of the factors' norms are lost, but fp32 factors do not have
more digits anyway. If terms cancel, so that the product is smaller than that, `product_svd` takes `qr`, which
squares nothing. `dense` is for stacks with R >= min(d_out, d_in).
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]

# Singular values below this share of the largest have no correct digit after squaring in fp64.
_KNOWN = 1e-7
# If the largest singular value is below this share of |B||A|, squaring would cost digits of fp32.
_CANCELLED = 1e-5


def product_svd(B: Tensor, A: Tensor, rank: int = 0, whole: bool = False) -> Svd:
    """Thin SVD of B @ A by the fastest of the three functions that is accurate to fp32's digits.

    Args:
        B: [..., d_out, R].
        A: [..., R, d_in].
        rank: the number of leading components to return; 0: all min(R, d_out, d_in).
        whole: True if even the smallest components must be right, so that all together are B @ A up to fp64's
            rounding; `gram` is then not used.

    Returns:
        U [..., d_out, k], S [..., k] descending, Vh [..., k, d_in], all fp64. Components whose singular value is
        zero to working precision have S = 0 and zero vectors.
    """
    d_out, R, d_in = B.shape[-2], B.shape[-1], A.shape[-1]
    if min(d_out, d_in) <= R:
        return dense(B, A, rank)
    if whole:
        return qr(B, A, rank)
    found = gram(B, A, rank)
    sizes = torch.linalg.matrix_norm(B).double() * torch.linalg.matrix_norm(A).double()
    return qr(B, A, rank) if bool((found[1][..., 0] < _CANCELLED * sizes).any()) else found


def gram(B: Tensor, A: Tensor, rank: int = 0) -> Svd:
    """From G_b = B'B and G_a = AA' = LL': the eigenvectors w of L' G_b L = (singular values squared) give
    U = B L w / s and V' = w' L' G_b A / s^2. Nothing is inverted, so near-parallel rows of A do no harm."""
    b, a = B.double(), A.double()
    g_b, g_a = b.mT @ b, a @ a.mT
    # a row of A and its column of B may have very different sizes, but only the size of their product matters
    sizes_b, sizes_a = g_b.diagonal(dim1=-2, dim2=-1).sqrt(), g_a.diagonal(dim1=-2, dim2=-1).sqrt()
    alive = (sizes_b > 0) & (sizes_a > 0)
    balance = torch.where(alive, (sizes_a / sizes_b.where(alive, torch.ones_like(sizes_b))).sqrt(), 1.0)
    g_b = g_b * balance[..., :, None] * balance[..., None, :]
    g_a = g_a / balance[..., :, None] / balance[..., None, :]
    root, failed = torch.linalg.cholesky_ex(g_a)
    if bool(failed.any()):  # the rows of A are linearly dependent; any other square root of G_a will do
        values, vectors = torch.linalg.eigh(g_a)
        root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    right = g_b @ root
    squares, w = _leading_eigenpairs(root.mT @ right, rank)
    s, inverse = _roots(squares)
    u = b @ (balance[..., :, None] * (root @ w) * inverse[..., None, :])
    vh = (inverse.square()[..., :, None] * (right @ w).mT / balance[..., None, :]) @ a
    return _signed(u, s, vh)


def singular_values(g_b: Tensor, g_a: Tensor) -> Tensor:
    """The singular values of B @ A from its Gram matrices B'B and AA' [..., R, R], largest first, fp64 [..., R].

    Values below 1e-8 of the product of the factors' norms are only rounding.
    """
    values, vectors = torch.linalg.eigh(g_a)
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return torch.linalg.eigvalsh(root.mT @ g_b @ root).clamp(min=0.0).sqrt().flip(-1)


def qr(B: Tensor, A: Tensor, rank: int = 0) -> Svd:
    """QR of B and of A', then the SVD of the R x R core, all in fp64: slower, and accurate where terms cancel."""
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    keep = rank or s.shape[-1]
    return _signed(q_b @ u[..., :keep], s[..., :keep], vh[..., :keep, :] @ q_a.mT)


def dense(B: Tensor, A: Tensor, rank: int = 0) -> Svd:
    """SVD from the product itself, in fp64, and the eigenvectors of its smaller Gram matrix; for R >= min(d_out, d_in).

    The product is projected on the eigenvectors. These are orthonormal however many digits squaring has cost, so that
    all components together are the product up to fp64's rounding. Vectors that belong to singular values below 1e-8
    of the largest are mixed with each other.
    """
    return of_matrix(B.double() @ A.double(), rank)


def of_matrix(matrix: Tensor, rank: int = 0) -> Svd:
    """SVD of a matrix [..., d_out, d_in], as in `dense`."""
    product = matrix.double()
    if product.shape[-2] <= product.shape[-1]:
        _, u = _leading_eigenpairs(product @ product.mT, rank)
        s, vh = _unit_rows(u.mT @ product)
        return _signed(u * (s > 0)[..., None, :], s, vh)
    _, v = _leading_eigenpairs(product.mT @ product, rank)
    s, u = _unit_rows((product @ v).mT)
    return _signed(u.mT, s, (v * (s > 0)[..., None, :]).mT)


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


def _leading_eigenpairs(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues (0: all) and their eigenvectors, the largest first; eigh has the reverse order."""
    values, vectors = torch.linalg.eigh(symmetric)
    keep = min(rank, values.shape[-1]) if rank else values.shape[-1]
    return values[..., -keep:].flip(-1), vectors[..., -keep:].flip(-1)


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
    peak = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vh * sign.mT
