"""LoRA's own start: A uniform, B = 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlora.adapters import AdapterState, initial
from fedlora.config import Config
from fedlora.exchange import ClientInfo
from fedlora.models import fresh_head, injection


def start(config: Config, clients: Sequence[ClientInfo], base: injection.Shapes | None = None) -> AdapterState:
    """The seeded adapter of round 1, from the base model's shapes: at each module's largest rank, B = 0.

    A classifier's head is the base's own, or a seeded one; see `model.head`.
    """
    found = base or injection.shapes(config.model, config.lora)
    largest = {module: max(clients, key=lambda client: client.rank_of(module)) for module in found.lora}
    generator = torch.Generator().manual_seed(config.run.seed)
    factors = initial(
        found.lora,
        {module: client.rank_of(module) for module, client in largest.items()},
        {module: client.scaling_of(module) for module, client in largest.items()},
        generator,
    )
    return AdapterState(lora=factors.lora, tensors=dict(found.head) or fresh_head(found.tensors, config.run.seed))
