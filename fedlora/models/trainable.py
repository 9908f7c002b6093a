"""What is trained of a model: each module's factors as a pair, and single tensors beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Pair:
    """One module's factors as parameters: dW = scaling * B @ A.

    Args:
        module: the module's name in the base model.
        A: [r, d_in]. In a batch of clients, a view of this client's rows of all clients' factors.
        B: [d_out, r], and a view in the same way.
        scaling: of the module on this client.

    A factor that is not trained has `requires_grad = False`, and no gradient.
    """

    module: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


@dataclass(frozen=True)
class Trainable:
    """What a client's optimizer works on.

    Args:
        pairs: the factors of every adapted module, trained or not.
        parameters: all that is trained, in a fixed order: module by module A, B and a core R, then tensors that are
            trained in full (a classifier's head, the parts of an adapter that is no pair of factors).
    """

    pairs: Sequence[Pair]
    parameters: Sequence[nn.Parameter]

    @property
    def others(self) -> list[nn.Parameter]:
        """What is trained and stands in no pair: cores, heads, parts of other kinds of adapters."""
        paired = {id(factor) for pair in self.pairs for factor in (pair.A, pair.B)}
        return [parameter for parameter in self.parameters if id(parameter) not in paired]
