"""Initializers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import StrategyError
from fedlora.common.registry import Registry

if TYPE_CHECKING:
    from fedlora.config import LoraConfig

    from ..base import Strategy
    from .base import Initializer

INITIALIZERS = Registry(
    noun="initializer",
    key="lora.init",
    options_key="lora.init-options",
    base="fedlora.strategies.initializers.base:Initializer",
    method="start",
    names={
        "uniform": "fedlora.strategies.initializers.uniform:Uniform",
        "lora-sb": "fedlora.strategies.initializers.lora_sb:LoraSb",
        "lora-xs": "fedlora.strategies.initializers.lora_xs:LoraXs",
        "lora-ga": "fedlora.strategies.initializers.lora_ga:LoraGa",
        "eva": "fedlora.strategies.initializers.eva:Eva",
        "pissa": "fedlora.strategies.initializers.pissa:Pissa",
        "olora": "fedlora.strategies.initializers.olora:OLora",
        "loldu": "fedlora.strategies.initializers.loldu:Loldu",
        "orthogonal": "fedlora.strategies.initializers.orthogonal:Orthogonal",
        "comp-lora": "fedlora.strategies.initializers.comp_lora:CompLora",
        "given": "fedlora.strategies.initializers.given:Given",
    },
)


def initializer(lora: LoraConfig, strategy: Strategy) -> Initializer:
    """The initializer that `lora.init` names, or, if that is auto, the one that the strategy needs.

    A strategy that needs a start with a core takes any such start.

    Raises:
        ConfigError: there is no such initializer, or it has no such options.
        StrategyError: the strategy needs another initializer, or cannot use this one.
    """
    needed = strategy.starts_with
    name = (needed or "uniform") if lora.init == "auto" else lora.init
    made: Initializer = INITIALIZERS.make(name, lora.init_options)
    if needed and name != needed and not (made.cores and strategy.cores):
        fitting = [n for n in INITIALIZERS.names if n == needed or (strategy.cores and INITIALIZERS.resolve(n).cores)]
        raise StrategyError(
            f"lora.init = {name}: this strategy needs factors that start as {' or '.join(fitting)} makes them; "
            f"set lora.init = auto, or {' or '.join(fitting)}"
        )
    if made.cores and not strategy.cores:
        raise StrategyError(
            f"lora.init = {name} starts with a core between A and B, which this strategy does not keep; "
            "set lora.init = auto",
            needs="cores",
        )
    if made.statistic and not strategy.any_statistic:
        raise StrategyError(
            f"lora.init = {name} starts from what clients measure, each in a basis of its own, which strategy.robust "
            "cannot compare entry by entry; set lora.init = auto, or strategy.robust = norm-bound, krum or multi-krum"
        )
    kind = KINDS.make(lora.kind, lora.kind_options)
    if not kind.pairs and name != "uniform":
        raise StrategyError(
            f"lora.init = {name} starts LoRA's A and B, and lora.kind = {lora.kind} has none; set lora.init = auto, or "
            "lora.kind = lora"
        )
    return made


def asks_clients(strategy: Strategy) -> bool:
    """Whether the strategy by itself chooses a start that is made from what clients measure in a round 0."""
    return bool(strategy.starts_with and INITIALIZERS.resolve(strategy.starts_with).statistic)
