"""LoRA-Pro: gradients of A and B whose common effect on B A is nearest to the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import Preconditioned, alike, check_fp64, in_fp64, scale_to, set_gradients, with_gradients
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

    def check(self, device: torch.device) -> None:
        check_fp64("lora-pro", device)

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(trained, config, self.base)


class _Steps(Preconditioned):
    def change(self) -> None:
        if self.clip and self.others:
            torch.nn.utils.clip_grad_norm_(self.others, self.clip)
        groups = alike(with_gradients(self.pairs))
        made: list[tuple[Tensor, Tensor]] = []
        sizes: list[Tensor] = []
        for pairs in groups:
            A, B, grad_a, grad_b = in_fp64(pairs)
            scaling = torch.tensor([p.scaling for p in pairs], dtype=torch.float64, device=A.device)[:, None, None]
            made.append(nearest(A, B, grad_a, grad_b, scaling))
            sizes.append(equivalent_norm(A, B, *made[-1], scaling).norm())
        factor = scale_to(torch.stack(sizes).norm(), self.clip) if sizes else 1.0
        for pairs, (of_a, of_b) in zip(groups, made, strict=True):
            set_gradients(pairs, of_a * factor, of_b * factor)


def nearest(A: Tensor, B: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float | Tensor) -> tuple[Tensor, Tensor]:
    """H_A and H_B; all in fp64, and batched over leading dimensions."""
    in_a, in_b = torch.linalg.eigh(A @ A.mT), torch.linalg.eigh(B.mT @ B)
    h_a = _solved(in_b, grad_a) / scaling**2
    h_b = _solved(in_a, grad_b.mT).mT / scaling**2
    h_b = h_b - B @ _solved(in_b, B.mT @ h_b)
    X = _sylvester(in_b, in_a, -h_a @ A.mT)
    return h_a + X @ A, h_b - B @ X


def equivalent_norm(A: Tensor, B: Tensor, h_a: Tensor, h_b: Tensor, scaling: float | Tensor) -> Tensor:
    """|s B H_A + s H_B A| of each module, without computing the sum."""
    products = (
        (h_a @ h_a.mT) * (B.mT @ B) + (h_b.mT @ h_b) * (A @ A.mT) + 2 * (B.mT @ h_b) * (A @ h_a.mT).mT
    ) * scaling**2
    return products.sum(dim=(-2, -1)).clamp(min=0.0).sqrt()


Eigen = tuple[Tensor, Tensor]


def _inverse(values: Tensor, largest: Tensor) -> Tensor:
    """1 / values, and 0 for those that are rounding alone in Gram matrices of fp32 factors."""
    return torch.where(values > 1e-12 * largest.clamp(min=torch.finfo(values.dtype).tiny), 1.0 / values, 0.0)


def _solved(gram: Eigen, right: Tensor) -> Tensor:
    """gram^+ @ right."""
    values, vectors = gram
    return vectors @ (_inverse(values, values[..., -1:])[..., None] * (vectors.mT @ right))


def _sylvester(left: Eigen, right: Eigen, value: Tensor) -> Tensor:
    """X with left X + X right = value, where both sides are zero or more."""
    (p, u), (q, v) = left, right
    sums = p.clamp(min=0.0)[..., :, None] + q.clamp(min=0.0)[..., None, :]
    return u @ ((u.mT @ value @ v) * _inverse(sums, sums.amax(dim=(-2, -1), keepdim=True))) @ v.mT
