"""Whether a strategy, an initializer, an allocation and an adapter kind can serve the clients of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError
from fedlora.config import client_rank, rank_pattern

from ..registry import naming_others
from .kinds import kind_of

if TYPE_CHECKING:
    from fedlora.adapters.kinds.base import AdapterKind
    from fedlora.config import Config, LoraConfig
    from fedlora.exchange import ClientInfo

    from ..allocations.base import Allocation
    from ..base import Strategy
    from ..initializers.base import Initializer


def check(strategy: Strategy, clients: Sequence[ClientInfo], lora: LoraConfig) -> None:
    """Raises StrategyError if the strategy cannot serve these clients or this kind of adapter; it names who can.

    Args:
        strategy: inside its wrappers.
        clients: all of the run.
        lora: names the kind.
    """
    from fedlora.adapters.kinds.registry import KINDS

    from ..allocations.registry import ALLOCATIONS
    from ..initializers.registry import initializer

    allocation: Allocation = ALLOCATIONS.make(lora.allocation, lora.allocation_options)
    kind = KINDS.make(lora.kind, lora.kind_options)
    with naming_others():
        start = initializer(lora, strategy)
        _check_round_0(lora, allocation, start, strategy, kind)
        if not (kind.pairs or strategy.any_kind):
            raise StrategyError(
                f"lora.kind = {lora.kind} has no factors A and B, which strategy.name and its wrappers need here; "
                "set lora.kind = lora",
                needs="any_kind",
            )
        strategy.check(clients)
    _check_complement(lora, start, strategy)
    ranks = [client.rank for client in clients]
    for rank in {rank for client in clients for rank in client.every_rank}:
        kind.check(rank)
        start.check_rank(rank)
    one_rank = len({client.all_ranks for client in clients}) == 1
    if not (start.unequal_ranks or one_rank):
        raise StrategyError(
            f"lora.init = {lora.init} needs one rank, got ranks {', '.join(map(str, ranks[:10]))}; set lora.ranks = '' "
            f"and lora.rank = {max(ranks)}, or lora.init = uniform"
        )
    if not (kind.pairs or kind.groups or one_rank):
        raise StrategyError(
            f"lora.kind = {lora.kind} needs one rank, got ranks {', '.join(map(str, ranks[:10]))}; "
            f"set lora.ranks = '' and lora.rank = {max(ranks)}, or lora.kind = lora"
        )


def _check_complement(lora: LoraConfig, start: Initializer, strategy: Strategy) -> None:
    """Raises StrategyError if an A that a restart draws, and clients do not train, leaves the space they keep to."""
    from ..base import trained_in_turn
    from ..wrappers.restart import Restart
    from ..wrappers.wrapper import layers

    if not start.terms or not any(isinstance(layer, Restart) for layer in layers(strategy)):
        return
    for number, factors in enumerate(trained_in_turn(strategy), start=1):
        if "A" not in factors:
            raise StrategyError(
                f"lora.init = {lora.init} keeps what clients train in a part of the space, strategy.restart-every "
                f"draws a new A, and clients do not train A in round {number}; set strategy.restart-every = 0, or "
                "another lora.init"
            )


def _check_round_0(
    lora: LoraConfig, allocation: Allocation, start: Initializer, strategy: Strategy, kind: AdapterKind
) -> None:
    """Raises StrategyError if the allocation cannot have its statistic in this run."""
    asks = f"lora.allocation = {lora.allocation} asks clients for a statistic before round 1"
    if not allocation.statistic:
        return
    if start.statistic not in ("", allocation.statistic):
        raise StrategyError(
            f"{asks}, {allocation.statistic}, and lora.init = {lora.init} for another, {start.statistic}; a run has "
            "one such round: set lora.allocation = pattern, or an initializer that asks for the same or for nothing"
        )
    if not kind.pairs:
        raise StrategyError(
            f"{asks}, which is measured beside LoRA's A and B, and lora.kind = {lora.kind} has none; set "
            "lora.allocation = pattern, or lora.kind = lora"
        )
    if not strategy.any_statistic:
        raise StrategyError(
            f"{asks}, which strategy.robust cannot compare entry by entry; set lora.allocation = pattern, or "
            "strategy.robust = norm-bound, krum or multi-krum"
        )


def check_evaluation(config: Config, strategy: Strategy) -> None:
    """Raises StrategyError if something stays on the clients, so that the server has no whole model to evaluate."""
    if strategy.personal and config.evaluate.server and not config.evaluate.clients:
        kept = kind_of(config).kept
        whose = f"lora.kind = {config.lora.kind}" if kept else f"strategy.name = {config.strategy.name}"
        raise StrategyError(
            f"{whose}: {' and '.join(sorted(strategy.personal))} stays on the clients, so that only they can evaluate "
            "what is learned; set evaluate.clients = true"
        )


def check_places(clients: Sequence[ClientInfo], lora: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ConfigError if the adapter kind cannot work in one of the adapted layers at a client's rank.

    Args:
        clients: all of the run.
        lora: names the kind.
        shapes: module -> (d_out, d_in).
    """
    from fedlora.adapters.kinds.base import Place
    from fedlora.adapters.kinds.registry import KINDS

    kind = KINDS.make(lora.kind, lora.kind_options)
    unlike = {client.all_ranks: client for client in clients}.values()
    for module, (d_out, d_in) in shapes.items():
        for rank in {client.rank_of(module) for client in unlike}:
            kind.check_place(Place(module, d_out, d_in, rank))


def simulated(config: Config) -> list[ClientInfo]:
    """The clients of a simulation, with the ranks that `lora.ranks` gives them."""
    from fedlora.exchange import ClientInfo

    lora, pattern = config.lora, rank_pattern(config.lora)
    return [
        ClientInfo(client, client_rank(lora, client), lora.alpha, rslora=lora.rslora, rank_pattern=pattern)
        for client in range(config.federation.clients)
    ]
