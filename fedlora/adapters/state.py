"""Adapters as values: factors by module, tensors by name, and walks over all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EMPTY = torch.empty(0, 0)


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's factors: dW = scaling * B @ A, or dW = scaling * B @ R @ A where there is a core R.

    Args:
        A: down projection, [r, d_in]. Empty where a message does not carry it.
        B: up projection, [d_out, r]. Empty where a message does not carry it.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732).
        R: the core between them, [r, r]; None without one.
    """

    A: Tensor
    B: Tensor
    scaling: float
    R: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]

    @property
    def down(self) -> Tensor:
        """What stands to the right of B, [r, d_in]: A, or R @ A in fp32 (fp64 where these are)."""
        return self.A if self.R is None else to_fp32(self.R) @ to_fp32(self.A)


@dataclass(frozen=True)
class AdapterState:
    """Everything that is trained: factors by base-model module name, and tensors trained in full.

    Args:
        lora: base-model module name -> factors.
        tensors: parameter name -> tensor trained in full (a classification head), averaged by every strategy.
    """

    lora: Mapping[str, LoraFactors] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def is_missing(factor: Tensor | None) -> bool:
    """Whether a message or an adapter does not have this factor."""
    return factor is None or factor.shape == EMPTY.shape


def to_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64: sums in bf16 or fp16 would lose the small terms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def keep_factors(adapter: AdapterState, factors: Collection[str]) -> AdapterState:
    """The adapter with these of the factors "A", "B" and "R"; the others are empty, or None."""
    lora = {
        name: LoraFactors(
            A=f.A if "A" in factors else EMPTY,
            B=f.B if "B" in factors else EMPTY,
            scaling=f.scaling,
            R=f.R if "R" in factors else None,
        )
        for name, f in adapter.lora.items()
    }
    return AdapterState(lora=lora, tensors=adapter.tensors)


def fill_missing(adapter: AdapterState, other: AdapterState) -> AdapterState:
    """The adapter with the other's factors where its own are missing; modules that the other lacks stay as they are."""
    lora = dict(adapter.lora)
    for name, f in adapter.lora.items():
        rest = other.lora.get(name, f)
        lora[name] = LoraFactors(
            A=f.A if f.A.numel() else rest.A,
            B=f.B if f.B.numel() else rest.B,
            scaling=f.scaling,
            R=rest.R if f.R is None else f.R,
        )
    return AdapterState(lora=lora, tensors=adapter.tensors)


def not_finite(adapter: AdapterState) -> str:
    """The name of a first module or tensor that holds a value that is not finite; empty where there is none."""
    for name, f in adapter.lora.items():
        if not all(torch.isfinite(factor).all() for factor in (f.A, f.B, f.R) if factor is not None):
            return name
    return next((name for name, tensor in adapter.tensors.items() if not torch.isfinite(tensor).all()), "")


def difference(left: AdapterState, right: AdapterState) -> AdapterState:
    """left - right, factor by factor (not of the products); a factor that `left` lacks stays empty."""
    return map_tensors(lambda name, x, y: x - y, left, right)


def sum_of(left: AdapterState, right: AdapterState) -> AdapterState:
    """left + right, factor by factor (not of the products); a factor that `left` lacks stays empty."""
    return map_tensors(lambda name, x, y: x + y, left, right)


def map_tensors(function: Callable[..., Tensor], *states: AdapterState) -> AdapterState:
    """`function(name, *tensors)` over all factors and tensors that the first state has; scalings are the first's.

    Args:
        function: gets "A", "B", "R" or a tensor's name, and then one tensor of each state, None where a state has none.
        states: the first one decides what there is.
    """
    first, others = states[0], states[1:]

    def factor(module: str, name: str) -> Any:
        mine = getattr(first.lora[module], name)
        if is_missing(mine):
            return mine
        theirs = [getattr(state.lora.get(module), name, None) for state in others]
        return function(name, mine, *(None if is_missing(x) else x for x in theirs))

    lora = {
        module: LoraFactors(A=factor(module, "A"), B=factor(module, "B"), scaling=f.scaling, R=factor(module, "R"))
        for module, f in first.lora.items()
    }
    tensors = {
        name: function(name, tensor, *(state.tensors.get(name) for state in others))
        for name, tensor in first.tensors.items()
    }
    return AdapterState(lora=lora, tensors=tensors)
