"""raFLoRA: the dense sum of rank-one parts, each a mean over the clients that have it, then FlexLoRA's SVD."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.naive import flexlora
from tests.naive.dense import Part, product, shares


class Module(flexlora.Module):
    def aggregate(self, parts: Sequence[Part]) -> None:
        top = max(len(part.A) for part in parts)
        total = self.update - flexlora.best(self.update, top)  # what no reply reaches stays
        for row in range(top):
            having = [part for part in parts if len(part.A) > row]
            for part, share in zip(having, shares(having), strict=True):
                one = slice(row, row + 1)
                total = total + share * product(part.B[:, one], part.A[one], part.scaling)
        self.update = flexlora.best(total, self.rank)


def energy_beyond(matrix: torch.Tensor, rank: int) -> float:
    """The sum of the squared singular values after the first `rank`."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())
