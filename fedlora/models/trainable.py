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
        core: the core R between the factors, trained or not; None: there is none.

    A factor that is not trained has `requires_grad = False`, and no gradient.
    """

    module: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    core: nn.Parameter | None = None


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

    @property
    def whole(self) -> list[Pair]:
        """The pairs that optimizers of pairs are made for: both factors are trained, and there is no core."""
        trained = {id(parameter) for parameter in self.parameters}
        return [pair for pair in self.pairs if pair.core is None and {id(pair.A), id(pair.B)} <= trained]

    @property
    def beside(self) -> list[nn.Parameter]:
        """The trained parameters that are in no whole pair."""
        paired = {id(factor) for pair in self.whole for factor in (pair.A, pair.B)}
        return [parameter for parameter in self.parameters if id(parameter) not in paired]
