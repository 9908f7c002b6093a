"""An initializer: how the shared adapter starts, and what clients are asked for before round 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import slice_adapter_for


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Args:
        adapter: the shared adapter, at the largest rank.
        folds: frozen updates that every client adds to its base first: an adapter that does not start at zero can
            take itself away from the base by one of them, with a scaling below zero.
    """

    adapter: AdapterState
    folds: tuple[AdapterState, ...] = ()


class Initializer(ABC):
    """A frozen dataclass whose fields are its options.

    Attributes:
        statistic: what clients measure in a round 0, before round 1: a name of `clients/statistics`, or a user's own as
            package.module:Class. Empty: nothing is asked, and there is no round 0.
        cores: True if the start has a core R between A and B; only strategies that keep cores can go on from it.
    """

    statistic: ClassVar[str] = ""
    cores: ClassVar[bool] = False

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """What one client is asked in round 0: the statistic at the base model, at the client's own ranks.

        Args:
            adapter: LoRA's own start, whose shapes matter.
            client: whom it is for.
        """
        sliced = slice_adapter_for(adapter, client)
        lora = {
            name: LoraFactors(A=torch.zeros_like(f.A), B=torch.zeros_like(f.B), scaling=1.0)
            for name, f in sliced.lora.items()
        }
        start = replace(sliced, lora=lora)
        return Broadcast(round=0, adapter=start, plan=Plan(train=frozenset()), job=self.statistic)

    @abstractmethod
    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """What the run starts from.

        Args:
            adapter: LoRA's own start: seeded A, B = 0, at each module's largest rank, and the head.
            replies: the clients' statistics in the order of client ids, to be consumed once; none without a statistic.
        """
