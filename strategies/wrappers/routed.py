"""Routed: the experts of an adapter kind are averaged over clients by how many tokens each client routed to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.adapters import to_fp32
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate

from ..base import ServerState
from .wrapper import Wrapper


@dataclass(frozen=True)
class Routed(Wrapper):
    """`X_e = sum_k w_ke X_ke / sum_k w_ke` with `w_ke = n_k N_ke`, for the slice e of an expert part.

    n_k is the client's number of rows, and N_ke the share of its routed tokens that expert e had, in [0, 1]. With
    equal shares it is the mean by rows. An expert to which nobody routed a token keeps its value. `lora.kind` asks for
    this wrapper. Memory: one set of experts.

    Args:
        inner: a strategy for every adapter kind, which averages the other tensors, and leaves those that no reply
            contains as they are.
        counted: end of the name of the tensors with the shares, [E, 1], such as "mixlora_N".
        experts: ends of the names of the experts' tensors, [E, ...].
    """

    counted: str = ""
    experts: frozenset[str] = frozenset()

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """As the inner strategy, and then the experts' means."""
        means: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def without_experts() -> Iterator[ClientUpdate]:
            for update in updates:
                tensors = update.adapter.tensors
                experts = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in self.experts}
                self._add(means, weights, experts, update)
                rest = {name: value for name, value in tensors.items() if name not in experts}
                yield replace(update, adapter=replace(update.adapter, tensors=rest))

        new = self.inner.aggregate(state, without_experts(), number)
        before = state.adapter.tensors
        found = {
            name: mean.where(_along(weights[name], mean) > 0, to_fp32(before[name])) for name, mean in means.items()
        }
        return new.updated({}, found)

    def _add(
        self, means: dict[str, Tensor], weights: dict[str, Tensor], experts: dict[str, Tensor], update: ClientUpdate
    ) -> None:
        for name, value in experts.items():
            shares = update.adapter.tensors.get(f"{name.rpartition('.')[0]}.{self.counted}")
            if shares is None or shares.shape != (len(value), 1) or bool((shares < 0).any()):
                got = "none" if shares is None else f"{tuple(shares.shape)}, the least {float(shares.min()):g}"
                raise StrategyError(
                    f"{name}: client {update.client_id} sent no usable shares of its tokens by expert: got {got}, "
                    f"expected ({len(value)}, 1) of at least 0"
                )
            weight = update.num_examples * to_fp32(shares).flatten()
            if name not in means:
                means[name], weights[name] = to_fp32(value).clone(), weight
                continue
            weights[name] = weights[name] + weight
            part = weight / weights[name].where(weights[name] > 0, 1.0)
            means[name] += _along(part, value) * (to_fp32(value) - means[name])


def _along(numbers: Tensor, tensor: Tensor) -> Tensor:
    """One number for each slice along the tensor's first dimension."""
    return numbers.reshape(-1, *[1] * (tensor.ndim - 1))
