"""LoRA's own start: A from a uniform distribution, B = 0."""

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
    """LoRA's own start (Hu et al. 2021, https://arxiv.org/abs/2106.09685): A uniform, drawn as in PEFT, and B = 0."""

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The given adapter, unchanged."""
        return Start(adapter)


def seeded(config: Config, clients: Sequence[ClientInfo], base: injection.Shapes | None = None) -> AdapterState:
    """LoRA's own start at each module's largest rank: A drawn with the run's seed, and B = 0.

    A classifier's head is the base model's own, or one drawn with the run's seed (see `model.head`).

    Args:
        config: the run's configuration.
        clients: the run's clients, whose ranks decide.
        base: shapes of the base model's modules and head; read from its files when left out.
    """
    found = base or injection.shapes(config.model, config.lora)
    unlike: dict[object, ClientInfo] = {}  # one client of each sort, since there may be many of few sorts
    for client in clients:
        unlike.setdefault(client.all_ranks, client)
    largest = {module: max(unlike.values(), key=lambda client: client.rank_of(module)) for module in found.lora}
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
