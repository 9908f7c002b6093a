"""GeLoRA's ranks: where a layer adds dimensions to its hidden states, its modules get more ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.layers import block_of
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..tools.questions import measured, question_for_tensors
from ..tools.replies import arrivals
from .base import Allocation, Learned, Shapes


@dataclass(frozen=True)
class GeLora(Allocation):
    """The rank of layer i is `max(d_{i+1} - d_i, 0) + 1`, where d_i is the intrinsic dimension of the states before it.

    Experimental: Ed-dib et al. 2024, "GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning",
    https://arxiv.org/abs/2412.09250, is known here from notes; which vectors it takes for an example's hidden state is
    not confirmed. Here it is the mean over the example's tokens. Each client estimates the dimensions with TwoNN in a
    round 0, over its examples of round 1, of which some dozens are needed; the server takes the median over the
    clients, weighted by their examples. Ranks are rounded, and never above the client's own, so that a client trains
    fewer numbers than it affords. Modules without a number in their names have the client's own rank.
    """

    statistic: ClassVar[str] = "dimensions"

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The dimensions before and after each layer."""
        blocks = sorted({block for module in adapter.lora if (block := block_of(module))})
        return question_for_tensors(self.statistic, adapter, {f"{block}.dimensions": (2,) for block in blocks})

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Layer -> the weighted medians of the dimensions before and after it."""
        found: dict[str, list[tuple[Tensor, float]]] = {}
        for reply in arrivals(replies, 0):
            for block, pair in measured(reply.adapter.tensors, "dimensions").items():
                found.setdefault(block, []).append((pair, reply.num_examples))
        return {block: _medians(pairs) for block, pairs in found.items()}

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """The growth of the dimension, rounded, within the client's own ranks."""
        ranks: dict[str, int] = {}
        for module in shapes:
            own, pair = client.rank_of(module), learned.get(block_of(module) or "")
            grown = None if pair is None else max(float(pair[1] - pair[0]), 0.0) + 1
            ranks[module] = own if grown is None else max(1, min(own, round(grown)))
        return ranks


def _medians(pairs: list[tuple[Tensor, float]]) -> Tensor:
    """Column by column: the smallest value that at least half of the weight does not exceed."""
    values = torch.stack([pair for pair, _ in pairs])
    weights = torch.tensor([weight for _, weight in pairs])
    order = values.argsort(dim=0)
    reached = weights[order].cumsum(dim=0) >= weights.sum() / 2
    return values.gather(0, order).gather(0, reached.int().argmax(dim=0, keepdim=True))[0]
