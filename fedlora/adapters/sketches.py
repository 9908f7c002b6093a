"""The random signs by which clients sketch a matrix, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from .kinds.signs import signs


def sketcher(rows: int, width: int) -> Tensor:
    """A matrix of random signs [rows, width], which is never sent; the identity if it is as wide as high.

    The clients' sketches M_k @ sketcher add up to a sketch of the sum of the M_k.
    """
    return torch.eye(rows) if width >= rows else signs("sketch", 0, rows, width)
