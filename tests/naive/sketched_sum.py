"""The sketched sum of dense matrices, in numpy: the mean update is formed, sketched whole, and recovered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.naive.dense import Part

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def ideal(parts: Sequence[Part]) -> Matrix:
    """sum_k p_k s_k B_k A_k."""
    examples = sum(part.examples for part in parts)
    total = np.zeros((len(parts[0].B), parts[0].A.shape[1]))
    for part in parts:
        total += part.examples / examples * part.scaling * (part.B.double().numpy() @ part.A.double().numpy())
    return total


def one_pass(ideal: Matrix, omega: Matrix, psi: Matrix) -> Matrix:
    """Q (Psi Q)^+ Psi ideal, with Q from the columns of ideal Omega."""
    q = np.linalg.qr(ideal @ omega)[0]
    return q @ np.linalg.pinv(psi @ q) @ (psi @ ideal)


def two_passes(ideal: Matrix, omega: Matrix) -> Matrix:
    """Q Q' ideal."""
    q = np.linalg.qr(ideal @ omega)[0]
    return q @ (q.T @ ideal)


def nearest(ideal: Matrix, rank: int) -> Matrix:
    """The nearest matrix of this rank."""
    u, s, vh = np.linalg.svd(ideal, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def apart(left: Matrix, right: Matrix) -> float:
    """|left - right|_F / |right|_F."""
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))
