"""Strategies by name, imported only when one is asked for: this module loads no torch.

A strategy is a frozen dataclass that extends `base.Strategy`; its fields, each with a default, are its options.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError
from fedlora.common.registry import Option, Registry

if TYPE_CHECKING:
    from .base import Strategy

NAMES: dict[str, str] = {
    "fedavg": "fedlora.strategies.methods.fedavg:FedAvg",
    "flora": "fedlora.strategies.methods.flora:Flora",
    "lora-fair": "fedlora.strategies.methods.lora_fair:LoraFair",
    "fedavg-zeropad": "fedlora.strategies.methods.fedavg_zeropad:FedAvgZeropad",
    "rblora": "fedlora.strategies.methods.rblora:RbLora",
    "hetlora": "fedlora.strategies.methods.hetlora:HetLora",
    "flexlora": "fedlora.strategies.methods.flexlora:FlexLora",
    "fedex": "fedlora.strategies.methods.fedex:FedEx",
    "florist": "fedlora.strategies.methods.florist:Florist",
    "ffa": "fedlora.strategies.methods.ffa:Ffa",
    "rolora": "fedlora.strategies.methods.rolora:RoLora",
    "fedsvd": "fedlora.strategies.methods.fedsvd:FedSvd",
    "fedsa": "fedlora.strategies.methods.fedsa:FedSa",
    "fedsb": "fedlora.strategies.methods.fedsb:FedSb",
    "flasc": "fedlora.strategies.methods.flasc:Flasc",
    "abmll": "fedlora.strategies.methods.abmll:Abmll",
    "fedrot": "fedlora.strategies.methods.fedrot:FedRot",
    "raflora": "fedlora.strategies.methods.raflora:RaFlora",
    "frlora": "fedlora.strategies.methods.frlora:FrLora",
    "fed-plora": "fedlora.strategies.methods.fed_plora:FedPLora",
    "fslora": "fedlora.strategies.methods.fslora:FsLora",
    "lora-a2": "fedlora.strategies.methods.lora_a2:LoraA2",
}


STRATEGIES = Registry(
    noun="strategy",
    key="strategy.name",
    options_key="strategy.options",
    base="fedlora.strategies.base:Strategy",
    method="aggregate",
    names=NAMES,
    error=StrategyError,
)


def load(name: str, **options: Option) -> Strategy:
    """A strategy with its options set.

    Args:
        name: one of `NAMES`, or your own class as "your_package.module:Class".
        options: values for the class's fields; the others keep their defaults.

    Raises:
        StrategyError: no such strategy, it cannot be imported, or an option has a wrong name, type or value.

    Example:
        >>> load("lora-fair", similarity="cosine", lam=0.01)
        LoraFair(similarity='cosine', lam=0.01)
    """
    return STRATEGIES.load(name, **options)


@contextmanager
def naming_others() -> Iterator[None]:
    """Adds to an error about what a strategy lacks the names of those that have it; see `StrategyError.needs`."""
    try:
        yield
    except StrategyError as error:
        if not error.needs:
            raise
        known, needs = {name: STRATEGIES.resolve(name) for name in NAMES}, error.needs.split(" or ")
        *names, last = sorted(name for name, cls in known.items() if any(getattr(cls, need) for need in needs))
        listed = f"{', '.join(names)} or {last}" if names else last
        raise StrategyError(f"{error}, or use strategy.name = {listed}") from None
