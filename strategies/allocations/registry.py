"""Allocations by name, and the ranks that a run's allocation gives to its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedlora.adapters import count_numbers
from fedlora.common.errors import StrategyError
from fedlora.common.registry import Registry
from fedlora.config import LoraConfig
from fedlora.exchange import Broadcast, ClientInfo

from ..tools.narrowing import narrowed
from .base import Allocation, Learned, Shapes
from .pattern import Pattern

ALLOCATIONS = Registry(
    noun="allocation of ranks",
    key="lora.allocation",
    options_key="lora.allocation-options",
    base="fedlora.strategies.allocations.base:Allocation",
    method="ranks",
    names={
        "pattern": "fedlora.strategies.allocations.pattern:Pattern",
        "prilora": "fedlora.strategies.allocations.prilora:PriLora",
        "eva": "fedlora.strategies.allocations.eva:EvaRanks",
        "gelora": "fedlora.strategies.allocations.gelora:GeLora",
        "dynamic": "fedlora.strategies.allocations.dynamic:Dynamic",
        "colora": "fedlora.strategies.allocations.colora:CoLora",
        "flexora": "fedlora.strategies.allocations.selection:Flexora",
        "diffora": "fedlora.strategies.allocations.selection:Diffora",
    },
)


@dataclass
class Ranks:
    """The ranks of a run's clients, as `lora.allocation` says.

    Attributes:
        name: of the rule.
        rule: spreads what a client affords.
        shapes: module -> (d_out, d_in), all adapted modules.
        learned: what the rule keeps of the clients' statistics. As long as it is None, a rule with a statistic leaves
            every client its own ranks.
    """

    name: str
    rule: Allocation
    shapes: Shapes
    learned: Learned | None = None

    @classmethod
    def of(cls, lora: LoraConfig, shapes: Shapes, learned: Learned | None = None) -> Ranks:
        """The ranks of a run.

        Args:
            lora: names the rule.
            shapes: module -> (d_out, d_in).
            learned: as it was saved with the run; None if there is nothing yet.
        """
        return cls(lora.allocation, ALLOCATIONS.make(lora.allocation, lora.allocation_options), shapes, learned)

    def give(self, client: ClientInfo) -> ClientInfo:
        """The client with its ranks by module.

        Raises:
            StrategyError: a module has no rank or one below 1, or all together exceed the client's budget.
        """
        # A pattern spreads nothing: no table of all modules for each of many clients.
        if type(self.rule) is Pattern or (self.rule.statistic and self.learned is None):
            return client
        own = replace(client, ranks={})
        ranks = dict(self.rule.ranks(own, self.shapes, self.learned or {}))
        _check(f"lora.allocation = {self.name} for client {client.client_id}", own, ranks, self.shapes)
        return replace(client, ranks=ranks)

    def narrow(self, sent: Broadcast) -> Broadcast:
        """The message, for no more than the modules that the rule trains."""
        modules = self.rule.modules(self.shapes, self.learned or {})
        return sent if modules is None else narrowed(sent, modules)


def _check(where: str, client: ClientInfo, ranks: Mapping[str, int], shapes: Shapes) -> None:
    odd = sorted(shapes.keys() ^ ranks.keys())
    if odd:
        raise StrategyError(f"{where}: expected a rank for each adapted module and no other, and {odd[0]!r} differs")
    for module, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise StrategyError(f"{where}: {module} has rank {rank!r}, expected a whole number of at least 1")
    affords = {module: client.rank_of(module) for module in shapes}
    spent, budget = count_numbers(ranks, shapes), count_numbers(affords, shapes)
    if spent > budget:
        raise StrategyError(
            f"{where}: its factors have {spent:,} numbers, and the client affords {budget:,}, by its rank "
            f"{client.rank}; spread no more than that over the modules"
        )
