"""LoRA-RITE: an adaptive optimizer whose steps of B A do not depend on how B A is divided into B and A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import alike, scale_to, whole_pairs
from .standard import over


@dataclass(frozen=True)
class LoraRite(ClientOptimizer):
    """Moments of the gradients in an orthonormal basis of the partner's columns.

    Yen et al. 2024, "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization",
    https://arxiv.org/abs/2410.20625, Algorithm 1. For A, with B = Q R (QR decomposition), the gradient G_A of A, the
    step number t from 1, and P = Q_t' Q_(t-1), which carries the moments to the new basis:

        G = G_A' R^+                                          [d_in, r]
        V = b2 P V P' + (1 - b2) G'G / d_in                   [r, r]
        M = b1 M P' + (1 - b1) G V^(-1/2)                     [d_in, r]
        A' = A' - lr M (R^+)'

    and for B the same with A' = Q R. b1 and b2 are the rates of moments with Adam's bias correction,
    b (1 - b^(t-1)) / (1 - b^t). Replacing A, B by S A, B S^-1 with any invertible S changes neither B A nor its steps.
    So it does not matter how the server divides an update into factors. FedProx on factors (`train.prox-mu`) breaks
    this, weight decay does not. A stands still as long as B = 0. A layer that a batch does
    not reach counts as one with gradients of zeros.

    Differences: R^+ is the pseudo-inverse, so that B may be 0 or have dependent columns. The paper adds to V the
    spectral mass that P loses; this is left out. `train.clip` bounds the common norm of all G, and that of the
    gradients of all other parameters, which AdamW steps.
    Cost: per factor a QR decomposition, O(d r^2), and two eigenproblems, O(r^3). State: d r numbers for M and d r for Q
    per factor, as much as AdamW's.

    Args:
        beta1, beta2: rates of the moments.
        eps: added to the square roots of V's eigenvalues.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6

    shares_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"train.optimizer-options: lora-rite's {name} = {value:g}, expected a number from 0 to below 1"
                )
        if not 0 < self.eps < float("inf"):
            raise ConfigError(f"train.optimizer-options: lora-rite's eps = {self.eps:g}, expected a number above 0")

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        return _Steps(self, trained, config)


class _Steps(Steps):
    def __init__(self, options: LoraRite, trained: Trainable, config: TrainConfig) -> None:
        self._groups = [(pairs, _Side(options), _Side(options)) for pairs in alike(whole_pairs(trained, config))]
        self._clip, self._decay = config.clip, config.weight_decay
        self._others = over(trained.beside, config, clip=config.clip)

    def step(self, lr: float) -> None:
        if self._groups:
            with torch.no_grad():
                self._step_pairs(lr)
        self._others.step(lr)

    def _step_pairs(self, lr: float) -> None:
        for pairs, of_a, of_b in self._groups:
            A, B = (torch.stack(factors) for factors in zip(*((pair.A, pair.B) for pair in pairs), strict=True))
            of_a.look(torch.stack([_gradient(pair.A) for pair in pairs]).mT, B)
            of_b.look(torch.stack([_gradient(pair.B) for pair in pairs]), A.mT)
        sizes = [side.gradient.norm() for _, *sides in self._groups for side in sides]
        factor = scale_to(torch.stack(sizes).norm(), self._clip)
        for pairs, of_a, of_b in self._groups:
            for pair, change_a, change_b in zip(pairs, of_a.step(factor).mT, of_b.step(factor), strict=True):
                pair.A.mul_(1 - lr * self._decay).sub_(change_a, alpha=lr)
                pair.B.mul_(1 - lr * self._decay).sub_(change_b, alpha=lr)


def _gradient(factor: nn.Parameter) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad


class _Side:
    """The A or B of n modules of equal shapes, [n, d, r], and their moments in the bases of their partners' columns.

    Attributes:
        gradient: G of the present step.
    """

    gradient: Tensor

    def __init__(self, options: LoraRite) -> None:
        self._options, self._steps = options, 0
        self._basis: Tensor | None = None

    def look(self, grad: Tensor, partner: Tensor) -> None:
        """Take up the gradients [n, d, r], and carry the moments to the bases of the partners [n, d', r]."""
        basis, triangle = torch.linalg.qr(partner)
        self._inverse = torch.linalg.pinv(triangle)
        self.gradient = grad @ self._inverse
        if self._basis is None:
            self._first = torch.zeros_like(self.gradient)
            self._second = torch.zeros_like(basis.mT @ basis)
        else:
            turn = basis.mT @ self._basis
            self._first = self._first @ turn.mT
            self._second = turn @ self._second @ turn.mT
        self._basis = basis

    def step(self, factor: float) -> Tensor:
        """The changes of the factors for a rate of 1, [n, d, r], with this multiple of the gradients."""
        self._steps += 1
        first, second = (_decay(beta, self._steps) for beta in (self._options.beta1, self._options.beta2))
        gradient = self.gradient * factor
        self._second = second * self._second + (1 - second) / gradient.shape[-2] * (gradient.mT @ gradient)
        equal = gradient @ _inverse_root(self._second, self._options.eps)
        self._first = first * self._first + (1 - first) * equal
        return self._first @ self._inverse.mT


def _decay(beta: float, step: int) -> float:
    """The share of the old moment, such that the moment is a mean from the first step on."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _inverse_root(symmetric: Tensor, eps: float) -> Tensor:
    """V^(-1/2); directions in which V is zero up to rounding count as zero."""
    values, vectors = torch.linalg.eigh(symmetric)
    noise = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].clamp(min=0.0)
    inverse = torch.where(values > noise, 1.0 / (values.clamp(min=0.0).sqrt() + eps), 0.0)
    return (vectors * inverse[..., None, :]) @ vectors.mT
