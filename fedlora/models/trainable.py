"""The trained parameters of a model: the factors of each module as a pair, and single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Pair:
    """One module's factors as parameters: dW = scaling * B @ A.

    Args:
        module: the module's name in the base model.
        A: the factor A, [r, d_in]. In a batch of clients, it is a view of this client's rows of all clients' factors.
        B: the factor B, [d_out, r]; in a batch of clients, a view too.
        scaling: the module's scaling on this client.

    A factor that is not trained has `requires_grad = False`, and no gradient.
    """

    module: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


@dataclass(frozen=True)
class Trainable:
    """The parameters that a client's optimizer changes.

    Args:
        pairs: the factors of every adapted module, trained or not.
        parameters: all trained parameters, in a fixed order: A, B and a core R, module by module, then tensors trained
            in full (a classifier's head, the parts of other kinds of adapters).
    """

    pairs: Sequence[Pair]
    parameters: Sequence[nn.Parameter]

    @property
    def others(self) -> list[nn.Parameter]:
        """The trained parameters that are in no pair: cores, heads, parts of other kinds of adapters."""
        paired = {id(factor) for pair in self.pairs for factor in (pair.A, pair.B)}
        return [parameter for parameter in self.parameters if id(parameter) not in paired]
