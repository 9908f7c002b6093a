"""Adapters as values: factors by module, tensors by name, and functions over all of them."""

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
        A: down projection, [r, d_in]; empty if a message does not contain it.
        B: up projection, [d_out, r]; empty if a message does not contain it.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732).
        R: the core between B and A, [r, r]; None without one.
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
        """The factor to the right of B, [r, d_in]: A, or with a core R @ A, in fp32 (fp64 if R or A is fp64)."""
        return self.A if self.R is None else to_fp32(self.R) @ to_fp32(self.A)


@dataclass(frozen=True)
class AdapterState:
    """An adapter: everything that is trained.

    Args:
        lora: name of a module of the base model -> its factors.
        tensors: name of a parameter -> tensor that is trained in full, such as a classifier's head. Every strategy
            averages these tensors.
    """

    lora: Mapping[str, LoraFactors] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def is_missing(factor: Tensor | None) -> bool:
    """Whether this factor is missing from its message or adapter."""
    return factor is None or factor.shape == EMPTY.shape


def to_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is fp64. Sums in bf16 or fp16 would lose small terms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def keep_factors(adapter: AdapterState, factors: Collection[str]) -> AdapterState:
    """The adapter with only the given factors of "A", "B" and "R"; the other factors are empty (A, B) or None (R)."""
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
    """The adapter, with missing factors taken from `other`; modules that `other` lacks are not changed."""
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
    """The name of the first module or tensor with a value that is not finite; empty if all values are finite."""
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
    """The adapter of `function(name, *tensors)` for each factor and tensor of the first state; it has its scalings.

    Args:
        function: gets "A", "B", "R" or a tensor's name, and then this tensor of each state, or None if a state lacks
            it.
        states: one or more adapters.
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


def without_values(adapter: AdapterState) -> AdapterState:
    """The names, ranks and shapes of an adapter, in tensors without memory."""
    return map_tensors(lambda name, tensor: tensor.to("meta"), adapter)
