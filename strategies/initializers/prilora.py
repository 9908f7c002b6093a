"""PRILoRA's ranks: they grow from the first layer to the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapters import count_numbers
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientInfo

from ..tools.layers import layer_of
from .ranks import Allocation, Shapes


@dataclass(frozen=True)
class PriLora(Allocation):
    """The rank of a module in layer l of L is `2 r (1 + (ratio - 1) l / (L - 1)) / (1 + ratio)`, rounded down.

    Experimental: Benedek and Wolf 2024, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation",
    https://arxiv.org/abs/2401.11316, is known here from its abstract and from notes: ranks grow linearly, from 4 to 12
    in its experiments. Here the mean over the layers is the client's own rank r, so that its budget holds. The paper's
    pruning of A is not there. Modules without a number in their names have the client's own rank.

    Args:
        ratio: rank of the last layer, divided by that of the first; 3 as in the paper's experiments.
    """

    ratio: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < float("inf"):
            raise ConfigError(
                f"lora.allocation-options: prilora's ratio = {self.ratio}, expected a number of at least 1"
            )

    def ranks(self, client: ClientInfo, shapes: Shapes) -> Mapping[str, int]:
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
