"""LoRA's own start: A uniform, B = 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedlora.adapters import AdapterState, initial
from fedlora.adapters.kinds.base import Place
from fedlora.adapters.kinds.registry import KINDS
from fedlora.config import Config
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.models import fresh_head, injection

from .base import Initializer, Start


@dataclass(frozen=True)
class Uniform(Initializer):
    """LoRA's own start (Hu et al. 2021, https://arxiv.org/abs/2106.09685): A uniform as PEFT draws it, B = 0."""

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The adapter as it is."""
        return Start(adapter)


def seeded(config: Config, clients: Sequence[ClientInfo], base: injection.Shapes | None = None) -> AdapterState:
    """The seeded adapter of round 1, from the base model's shapes: at each module's largest rank, B = 0.

    A classifier's head is the base's own, or a seeded one; see `model.head`.
    """
    found = base or injection.shapes(config.model, config.lora)
    largest = {module: max(clients, key=lambda client: client.rank_of(module)) for module in found.lora}
    generator = torch.Generator().manual_seed(config.run.seed)
    head = dict(found.head) or fresh_head(found.tensors, config.run.seed)
    kind = KINDS.make(config.lora.kind, config.lora.kind_options)
    if not kind.pairs:
        parts: dict[str, torch.Tensor] = {}
        for module in sorted(found.lora):
            client = largest[module]
            place = Place(module, *found.lora[module], client.rank_of(module), client.scaling_of(module))
            parts |= {kind.key(module, part): value for part, value in kind.initial(place, generator).items()}
        return AdapterState(tensors={**head, **parts})
    factors = initial(
        found.lora,
        {module: client.rank_of(module) for module, client in largest.items()},
        {module: client.scaling_of(module) for module, client in largest.items()},
        generator,
    )
    return AdapterState(lora=factors.lora, tensors=head)
