"""LoRA-Pro: gradients of A and B whose common effect on B A is nearest to the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import Preconditioned, gradients, scale_to, with_gradients
from .standard import Base


@dataclass(frozen=True)
class LoraPro(ClientOptimizer):
    """AdamW on changed gradients of the factors.

    Wang et al. 2024, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", https://arxiv.org/abs/2407.18242.
    The weight is W + s B A, and the factors have the gradients G_A = s B'G and G_B = s G A', where G, the gradient of
    W, is never computed. Steps along H_A, H_B change the weight along the *equivalent gradient* s B H_A + s H_B A. It
    is nearest to G, by Frobenius norm, for

        H_A = (B'B)^-1 G_A / s^2 + X A
        H_B = (I - B (B'B)^-1 B') G_B (A A')^-1 / s^2 - B X

    with any X. The one here makes H_A, H_B nearest to G_A, G_B: B'B X + X A A' = -(B'B)^-1 G_A A' / s^2.

    Differences: this is the factor form. AdamW's moments are those of H_A and H_B; the paper's Adam keeps moments of
    the equivalent gradient, which are as large as W, and projects again. Inverses are pseudo-inverses in fp64, so that
    B may be 0. `train.clip` bounds the common norm of the equivalent gradients of all modules, as full fine-tuning
    would, and that of the gradients of all other parameters, which the base steps.
    Cost: per pair two Gram matrices and three products, O(d r^2), and two eigenproblems, O(r^3), in fp64. State: the
    base's.

    Args:
        base: steps along H_A, H_B: adamw, or sgd for plain steps.
    """

    base: Base = "adamw"

    shares_batch: ClassVar[bool] = True

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(trained, config, self.base)


class _Steps(Preconditioned):
    def change(self) -> None:
        pairs = with_gradients(self.pairs)
        made = [nearest(pair.A, pair.B, *gradients(pair), pair.scaling) for pair in pairs]
        if self.clip and self.others:
            torch.nn.utils.clip_grad_norm_(self.others, self.clip)
        sizes = [equivalent_norm(pair.A, pair.B, *both, pair.scaling) for pair, both in zip(pairs, made, strict=True)]
        factor = scale_to(torch.stack(sizes).norm(), self.clip) if sizes else 1.0
        for pair, both in zip(pairs, made, strict=True):
            for grad, better in zip(gradients(pair), both, strict=True):
                grad.copy_(better * factor)


def nearest(A: Tensor, B: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """H_A and H_B, in fp64."""
    a, b, grad_a, grad_b = (tensor.double() for tensor in (A, B, grad_a, grad_b))
    in_a, in_b = torch.linalg.eigh(a @ a.mT), torch.linalg.eigh(b.mT @ b)
    h_a = _solved(in_b, grad_a) / scaling**2
    h_b = _solved(in_a, grad_b.mT).mT / scaling**2
    h_b = h_b - b @ _solved(in_b, b.mT @ h_b)
    x = _sylvester(in_b, in_a, -h_a @ a.mT)
    return h_a + x @ a, h_b - b @ x


def equivalent_norm(A: Tensor, B: Tensor, h_a: Tensor, h_b: Tensor, scaling: float) -> Tensor:
    """|s B H_A + s H_B A|, without computing the sum."""
    a, b = A.double(), B.double()
    one, other = h_a.mT, h_b
    squares = (
        ((one.mT @ one) * (b.mT @ b)).sum()
        + ((other.mT @ other) * (a @ a.mT)).sum()
        + 2 * ((b.mT @ other) * (a @ one).mT).sum()
    )
    return scaling * squares.clamp(min=0.0).sqrt()


Eigen = tuple[Tensor, Tensor]


def _known(values: Tensor) -> Tensor:
    """Which eigenvalues of a Gram matrix of fp32 factors are not rounding alone."""
    return values > 1e-12 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)


def _solved(gram: Eigen, right: Tensor) -> Tensor:
    """gram^+ @ right."""
    values, vectors = gram
    inverse = torch.where(_known(values), 1.0 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.mT @ right))


def _sylvester(left: Eigen, right: Eigen, value: Tensor) -> Tensor:
    """X with left X + X right = value, where both sides are zero or more."""
    (p, u), (q, v) = left, right
    sums = p.clamp(min=0.0)[:, None] + q.clamp(min=0.0)[None, :]
    inverse = torch.where(sums > 1e-12 * sums.max().clamp(min=torch.finfo(sums.dtype).tiny), 1.0 / sums, 0.0)
    return u @ ((u.mT @ value @ v) * inverse) @ v.mT
