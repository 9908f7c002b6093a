"""PRILoRA: ranks that grow from the first layer to the last, and A pruned after each round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, count_numbers
from fedlora.adapters.layers import layer_of
from fedlora.common.errors import ConfigError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..tools.inputs import STATISTIC, ask_for_inputs, sizes
from .base import Allocation, Learned, Shapes


@dataclass(frozen=True)
class PriLora(Allocation):
    """The rank of a module in layer l of L is `2 r (1 + (ratio - 1) l / (L - 1)) / (1 + ratio)`, rounded down.

    Experimental: Benedek and Wolf 2024, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation",
    https://arxiv.org/abs/2401.11316, is known here from its abstract and from notes: ranks grow linearly, from 4 to 12
    in its experiments, and every some steps the entries of A of the least importance `|A_ij| |x_j|` become zero; how
    many is not confirmed. Here the mean over the layers is the client's own rank r, so that its budget holds. With
    `prune` above 0, the server sets that share of each row of A to zero after each round, alike for all clients;
    clients then train these entries on from zero. |x_j| is the root mean square of the module's input j, which clients
    measure in a round 0, where the paper follows it while it trains. Modules without a number in their names have the
    client's own rank.

    Args:
        ratio: rank of the last layer, divided by that of the first; 3 as in the paper's experiments.
        prune: share of each row of A that is set to zero after each round, below 1; 0: no pruning, and no round 0.
    """

    ratio: float = 3.0
    prune: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < float("inf"):
            raise ConfigError(
                f"lora.allocation-options: prilora's ratio = {self.ratio}, expected a number of at least 1"
            )
        if not 0 <= self.prune < 1:
            raise ConfigError(f"lora.allocation-options: prilora's prune = {self.prune}, expected 0 or more, below 1")

    @property
    def statistic(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return STATISTIC if self.prune else ""

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The sums of all modules' inputs, with the narrowest sketch."""
        return ask_for_inputs(adapter, client, width=1)

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Module -> the root mean square of each of its inputs."""
        return sizes(replies)

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """Ranks that grow with the layer, and are at least 1; the last layers give back what that costs."""
        layer = {module: found for module in shapes if (found := layer_of(module)) is not None}
        last = max(layer.values(), default=0)
        own = {module: client.rank_of(module) for module in shapes}
        ranks = dict(own)
        for module, number in layer.items():
            share = 2 * (1 + (self.ratio - 1) * number / last) / (1 + self.ratio) if last else 1.0
            ranks[module] = max(1, int(own[module] * share + 1e-9))
        over = count_numbers(ranks, shapes) - count_numbers(own, shapes)
        for module in sorted(layer, key=lambda module: -layer[module]):
            while over > 0 and ranks[module] > 1:
                ranks[module] -= 1
                over -= sum(shapes[module])
        return ranks

    def after_round(self, adapter: AdapterState, learned: Learned) -> AdapterState:
        """The adapter without the least important entries of each row of A."""
        lora = {
            name: _pruned(f, learned[name], self.prune) if name in learned else f for name, f in adapter.lora.items()
        }
        return replace(adapter, lora=lora)


def _pruned(factors: LoraFactors, size: Tensor, share: float) -> LoraFactors:
    count = int(share * factors.A.shape[1])
    least = (factors.A.abs() * size.to(factors.A)).topk(count, dim=1, largest=False).indices
    return replace(factors, A=factors.A.scatter(1, least, torch.zeros_like(least, dtype=factors.A.dtype)))
