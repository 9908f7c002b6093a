"""What initializers have in common that start from the base model's own weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate, Term

from .base import Initializer, Start

Weights = Callable[[str], Tensor]


class FromWeights(Initializer):
    """Makes each module's start from its weight. A run binds it to the weights of its base model by `Bound`.

    The weights are those with which the run computes: dequantized ones, if the base model is quantized. Where the start
    is an update that is not zero, a fold with its negative stands beside the base model, so that the run starts at the
    base model and no weight is changed. The papers subtract the start from the weights instead.

    Attributes:
        cancelled: True if a fold takes the start away; False if the start adds nothing.
    """

    cancelled: ClassVar[bool] = True
    unequal_ranks: ClassVar[bool] = False

    @abstractmethod
    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """One module's start.

        Args:
            first: LoRA's own start, with the rank and the scaling that the result must have.
            weight: the module's weight, [d_out, d_in], in fp64.
        """

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        raise StrategyError(f"{type(self).__name__} starts from weights; bind it to a base model's weights with Bound")


def with_factors(first: LoraFactors, A: Tensor, B: Tensor) -> LoraFactors:
    """The first rows of A and columns of B in fp32, filled up with zeros to the rank of `first`, at its scaling."""
    missing = first.rank - len(A)
    A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    return replace(first, A=A.to(first.A), B=B.to(first.B))


@dataclass(frozen=True)
class Bound(Initializer):
    """An initializer with the weights that it starts from.

    Args:
        inner: makes each module's start.
        weights: module -> its weight, [d_out, d_in].
    """

    inner: FromWeights
    weights: Weights

    @property
    def terms(self) -> tuple[Term, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.terms

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """All modules' starts, and the fold that takes them away."""
        lora = {name: self.inner.factors(f, self.weights(name).double()) for name, f in adapter.lora.items()}
        away = {name: replace(f, scaling=-f.scaling) for name, f in lora.items()}
        return Start(replace(adapter, lora=lora), folds=(AdapterState(lora=away),) if self.inner.cancelled else ())
