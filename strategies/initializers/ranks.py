"""How the ranks that a client affords are spread over the modules: one rule by its name, for all clients of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedlora.adapters import count_numbers
from fedlora.common.errors import StrategyError
from fedlora.common.registry import Registry
from fedlora.config import LoraConfig
from fedlora.exchange import ClientInfo

Shapes = Mapping[str, tuple[int, int]]


class Allocation(ABC):
    """A frozen dataclass whose fields are its options."""

    @abstractmethod
    def ranks(self, client: ClientInfo, shapes: Shapes) -> Mapping[str, int]:
        """The rank of each module on one client.

        Args:
            client: `client.rank_of(module)` is what it affords. Over all modules together, the factors may have as many
                numbers as with these ranks, which is the client's budget.
            shapes: module -> (d_out, d_in), all adapted modules. A rank r takes r (d_out + d_in) numbers.

        Returns:
            Module -> rank, at least 1, for every module. It depends on nothing but the arguments and the options.
        """


@dataclass(frozen=True)
class Pattern(Allocation):
    """Each module has the rank that `lora.rank-pattern` gives it, and otherwise the client's own."""

    def ranks(self, client: ClientInfo, shapes: Shapes) -> Mapping[str, int]:
        """What the client affords, module by module."""
        return {module: client.rank_of(module) for module in shapes}


ALLOCATIONS = Registry(
    noun="allocation of ranks",
    key="lora.allocation",
    options_key="lora.allocation-options",
    base="fedlora.strategies.initializers.ranks:Allocation",
    method="ranks",
    names={
        "pattern": "fedlora.strategies.initializers.ranks:Pattern",
        "prilora": "fedlora.strategies.initializers.prilora:PriLora",
    },
)


def allocator(lora: LoraConfig, shapes: Shapes) -> Callable[[ClientInfo], ClientInfo]:
    """What gives each client of a run its ranks by module, as `lora.allocation` says.

    Args:
        lora: names the rule.
        shapes: module -> (d_out, d_in), all adapted modules.

    Returns:
        A function of a client, which raises StrategyError if a module has no rank or one below 1, or if all together
        exceed the client's budget.
    """
    rule: Allocation = ALLOCATIONS.make(lora.allocation, lora.allocation_options)
    if type(rule) is Pattern:  # nothing to spread: no table of all modules for each of many clients
        return lambda client: client

    def allocated(client: ClientInfo) -> ClientInfo:
        ranks = dict(rule.ranks(client, shapes))
        _check(f"lora.allocation = {lora.allocation} for client {client.client_id}", client, ranks, shapes)
        return replace(client, ranks=ranks)

    return allocated


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
