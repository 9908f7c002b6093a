"""What rules have in common that give ranks in proportion to a score of each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.exchange import ClientInfo

from ..tools.budget import most_worth
from .base import Allocation, Learned, Shapes, check_growth


@dataclass(frozen=True)
class Proportional(Allocation):
    """Ranks in proportion to the scores that `learn` returned, module -> [1], where those below 0 count as 0.

    Every module has at least rank 1. Equal scores give equal ranks.

    Args:
        growth: largest rank of a module, as a multiple of the client's own.
    """

    growth: float = 2.0

    def __post_init__(self) -> None:
        check_growth(type(self).__name__.lower(), self.growth)

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """In proportion to the scores, as far as the client's budget goes."""
        scores = {module: max(0.0, float(score)) for module, score in learned.items()}
        return most_worth(client, shapes, lambda module, rank: scores.get(module, 0.0) / (rank + 1), self.growth)
