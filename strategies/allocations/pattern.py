"""Ranks by the names of modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.exchange import ClientInfo

from .base import Allocation, Learned, Shapes


@dataclass(frozen=True)
class Pattern(Allocation):
    """Each module has the rank that `lora.rank-pattern` gives it, and otherwise the client's own."""

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """What the client affords, module by module."""
        return {module: client.rank_of(module) for module in shapes}
