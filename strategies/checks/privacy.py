"""Whether nothing leaves the clients outside the mechanism of `privacy.level`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError

from ..registry import STRATEGIES, naming_others
from .kinds import kind_of

if TYPE_CHECKING:
    from fedlora.config import Config, LoraConfig

    from ..allocations.base import Allocation
    from ..base import Strategy


def check_client_level(config: Config) -> None:
    """Raises StrategyError if a rule needs single replies, of which there is one for all."""
    if config.strategy.robust != "none":
        raise StrategyError(
            f"strategy.robust = {config.strategy.robust} compares the clients' replies, and with privacy.level = "
            "client no client may decide whether another one counts; each is clipped to privacy.clip instead: set "
            "strategy.robust = none"
        )
    if config.wire.sum != "none" and STRATEGIES.resolve(config.strategy.name).of_ideal:
        raise StrategyError(
            f"wire.sum = {config.wire.sum}: privacy.level = client clips what each client changed, which sketches do "
            "not tell exactly; set wire.sum = none: the server makes the sketches"
        )


def check_private(strategy: Strategy, config: Config) -> None:
    """Check that nothing leaves the clients outside the mechanism of `privacy.level`.

    Args:
        strategy: inside its wrappers.
        config: of the run.

    Raises:
        StrategyError: a round 0 would send statistics without noise, or the adapter kind's parts are not clipped.
    """
    from fedlora.exchange.privacy import WITH_NOISE, starts_with_noise

    level, lora = f"privacy.level = {config.privacy.level}", config.lora
    if config.privacy.level == "none":
        return
    of_start, of_ranks = statistics(strategy, lora)
    if of_start and not (starts_with_noise(config) and of_start in WITH_NOISE):
        fix = f"set lora.init = {'lora-xs' if strategy.cores else 'uniform'}"
        if of_start in WITH_NOISE and config.privacy.level == "example":
            fix += ", or privacy.start = noise"
        raise StrategyError(
            f"lora.init starts from statistics of the clients' rows ({of_start}), which they would send before "
            f"round 1 without noise, and {level} allows nothing without noise; {fix}"
        )
    if of_ranks:
        raise StrategyError(
            f"lora.allocation = {lora.allocation} spreads ranks by statistics of the clients' rows "
            f"({of_ranks}), which they would send before round 1 without noise, and {level} allows nothing "
            "without noise; set lora.allocation = pattern"
        )
    if not kind_of(config).pairs:
        raise StrategyError(
            f"lora.kind = {lora.kind}: {level} clips LoRA's factors A and B, which this kind does not have; set "
            "lora.kind = lora"
        )


def statistics(strategy: Strategy, lora: LoraConfig) -> tuple[str, str]:
    """Names of what clients measure in round 0 for the initializer and for the allocation; empty for nothing."""
    from ..allocations.registry import ALLOCATIONS
    from ..initializers.registry import initializer

    with naming_others():
        start = initializer(lora, strategy)
    allocation: Allocation = ALLOCATIONS.make(lora.allocation, lora.allocation_options)
    return start.statistic, allocation.statistic


def releases(strategy: Strategy) -> int:
    """The number of sums with noise in each round at the level of clients."""
    from ..wrappers.client_noise import ClientNoise
    from ..wrappers.wrapper import layers

    return next((layer.releases for layer in layers(strategy) if isinstance(layer, ClientNoise)), 1)


def multiplies_noise(strategy: Strategy) -> bool:
    """Whether there are rounds that train both A and B, so that noise on one is multiplied with noise on the other.

    Noise on products is not.
    """
    from ..base import trained_in_turn
    from ..wrappers.product_noise import ProductNoise
    from ..wrappers.wrapper import layers

    if any(isinstance(layer, ProductNoise) for layer in layers(strategy)):
        return False
    return any(each >= {"A", "B"} for each in trained_in_turn(strategy))
