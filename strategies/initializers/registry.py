"""Initializers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    },
)


def initializer(lora: LoraConfig, strategy: Strategy) -> Initializer:
    """How a run starts: as `lora.init` says, or as the strategy wants it where that is auto.

    Raises:
        ConfigError: there is no such initializer, or it has no such options.
        StrategyError: the strategy needs another start.
    """
    needed = strategy.starts_with
    if needed and lora.init not in ("auto", needed):
        raise StrategyError(
            f"lora.init = {lora.init}: this strategy trains between factors that start as {needed} makes them; "
            f"set lora.init = auto, or {needed}"
        )
    return INITIALIZERS.make(needed or "uniform" if lora.init == "auto" else lora.init, lora.init_options)
