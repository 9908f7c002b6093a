"""LoRA-FAIR: the mean factors, with B corrected so that B A comes near to the ideal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, norm
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import with_rank_restored
from ..tools.replies import EqualShapes, equal_shapes, gather

_STEPS = 1000
_GRADIENT = 1e-8
_ROUNDING = 1e-12  # of f, which is near 1


@dataclass(frozen=True)
class LoraFair(Strategy):
    """`A = mean A_k`, `B = mean B_k + dB`, with a small dB that brings `B A` near to `sum_k p_k s_k B_k A_k`.

    Bian et al. 2024, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
    https://arxiv.org/abs/2411.14961, with the clients starting from the result ("Avg-Initial"). Differences from the
    paper: the minimum is computed instead of approached by SGD; the default similarity is the squared distance, which
    has a closed form; A_k is multiplied by the client's scaling, and smaller ranks are padded with zeros.
    Memory: the factors of all replies. Cost: O(K d r^2), and with "cosine" O(d r^2) more for each step.

    Args:
        similarity: "frobenius" minimises `|ideal - (B + dB) A|^2 + lam |dB|^2`; "cosine", the paper's, minimises
            `1 - cos(ideal, (B + dB) A) + lam |dB|^2`.
        lam: weight of `|dB|^2`; 0.01 as in the paper's experiments.
    """

    similarity: Literal["frobenius", "cosine"] = "frobenius"
    lam: float = 0.01

    of_ideal: ClassVar[bool] = True
    needs_means: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise StrategyError(f"strategy.options: lora-fair's lam = {self.lam}, expected a number of at least 0")

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean A and the corrected B. A module or tensor that no reply contains keeps its value."""
        parts, dense = gather(updates, number)
        lora = dict[str, LoraFactors]()
        for batch in equal_shapes(parts):
            A, B = self._refined(batch)
            for name, a, b in zip(batch.names, A, B, strict=True):
                before = state.adapter.lora.get(name, parts[name].factors[0])
                refined = LoraFactors(
                    A=(a / before.scaling).to(batch.dtype), B=b.to(batch.dtype), scaling=before.scaling
                )
                lora[name] = with_rank_restored(refined, before)
        return state.updated(lora, dense)

    def _refined(self, batch: EqualShapes) -> tuple[Tensor, Tensor]:
        """The mean A, [n, r, d_in], and the corrected B, [n, d_out, r], in fp64; r is the largest rank."""
        A, B = batch.A, batch.B  # their product is the ideal; p_k s_k is in A
        mean_a, mean_b = batch.mean_a, batch.mean_b
        gram = mean_a @ mean_a.mT
        cross = B @ (A @ mean_a.mT)
        if self.similarity == "frobenius":
            return mean_a, mean_b + solve(cross - mean_b @ gram, gram, self.lam)
        sizes = [norm(LoraFactors(A=a, B=b, scaling=1.0)) for a, b in zip(A, B, strict=True)]
        minima = [cosine_minimum(*each, self.lam) for each in zip(mean_b, gram, cross, sizes, strict=True)]
        return mean_a, torch.stack(minima)


def solve(right: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """`right (gram + ridge I)^-1`; if the matrix is singular, the smallest solution, by its pseudo-inverse.

    Args:
        right: [..., d_out, r].
        gram: [..., r, r], symmetric positive semi-definite.
        ridge: at least 0.
    """
    values, vectors = torch.linalg.eigh(gram)
    shifted = values.clamp(min=0.0) + ridge
    # Rows of A are known to fp32's relative 1e-7, so that eigenvalues of A A' below 1e-13 of the largest are rounding.
    known = shifted > 1e-13 * shifted.amax(dim=-1, keepdim=True)
    inverse = torch.where(known, 1.0 / shifted.where(known, torch.ones_like(shifted)), 0.0)
    return (right @ vectors) * inverse[..., None, :] @ vectors.mT


def cosine_minimum(mean_b: Tensor, gram: Tensor, cross: Tensor, ideal_norm: float, lam: float) -> Tensor:
    """A minimum X of `f = 1 - cos(ideal, X A) + lam |X - B|^2`, sought from X = B until the gradient is below 1e-8.

    With q = |X A| and c = cos, the gradient is zero where `X ((c/q^2) G + 2 lam I) = C/(|ideal| q) + 2 lam B`.
    Each step solves this equation for the X on the left, then multiplies X by `<X, B>/<X, X>`: the cosine does not
    depend on the scale, which would otherwise change only slowly. No minimum exists if the best direction points
    away from B, since X then shrinks for ever. The search ends after 1000 steps, or when f rises.

    Args:
        mean_b: B, [d_out, r].
        gram: G = A A', [r, r].
        cross: C = ideal A', [d_out, r].
        ideal_norm: |ideal|_F.
        lam: at least 0.

    Returns:
        X, [d_out, r]; B itself if the cosine is undefined, because `B A` or the ideal is zero.
    """

    def evaluate(x: Tensor) -> tuple[float, float, float]:
        q = float(((x @ gram) * x).sum().clamp(min=0.0)) ** 0.5
        c = float((cross * x).sum()) / (ideal_norm * q) if ideal_norm and q else 0.0
        return q, c, 1.0 - c + lam * float((x - mean_b).square().sum())

    x = mean_b
    q, c, value = evaluate(x)
    if not ideal_norm or not q:
        return mean_b
    for _ in range(_STEPS):
        gradient = (c / q**2) * (x @ gram) - cross / (ideal_norm * q) + 2 * lam * (x - mean_b)
        if float(gradient.norm()) < _GRADIENT:
            break
        # |c|, since with a negative cosine the step would increase f
        tried = x - solve(gradient, (abs(c) / q**2) * gram, 2 * lam)
        along = float((tried * mean_b).sum())
        if along > 0:
            tried = tried * (along / float(tried.square().sum()))
        q, c, tried_value = evaluate(tried)
        if not q or tried_value > value + _ROUNDING:
            break
        x, value = tried, tried_value
    return x
