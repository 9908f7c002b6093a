"""FedSVD: the mean B on the common A, then the dense product's SVD. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.naive import ffa
from tests.naive.dense import Part, product


class Module(ffa.Module):
    def aggregate(self, parts: Sequence[Part]) -> None:
        super().aggregate(parts)
        rank = len(self.A)
        u, s, vh = torch.linalg.svd(product(self.B, self.A, 1.0))
        A, B = torch.zeros_like(self.A), torch.zeros_like(self.B)
        for j in range(min(rank, len(s))):
            A[j], B[:, j] = vh[j], s[j] * u[:, j]
        self.A, self.B = A, B
