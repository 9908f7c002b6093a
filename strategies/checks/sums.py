"""Whether a sum of the clients' replies is enough for a run: of sketches, of masked numbers, or of an edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError
from fedlora.config import clients_per_round

from ..registry import NAMES, STRATEGIES
from .kinds import kind_of
from .privacy import statistics

if TYPE_CHECKING:
    from fedlora.config import Config
    from fedlora.exchange import ClientInfo

    from ..base import Strategy


def check_sum(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if sketches of the clients' updates, or their sum, are not enough for this run."""
    from ..wrappers.wrapper import innermost

    inside, asked = innermost(strategy), "wire.sum = sketch"
    if config.wire.sum == "none" or inside.linear:
        return
    if not inside.of_ideal or strategy.personal:
        known = [STRATEGIES.resolve(name) for name in NAMES]
        *names, last = sorted(n for n, c in zip(NAMES, known, strict=True) if c.of_ideal)
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, and the server would "
            f"see only the mean of their updates; use strategy.name = {', '.join(names)} or {last}, or a linear one "
            "such as fedavg, which needs no sketch"
        )
    if config.strategy.robust != "none":
        raise StrategyError(
            f"{asked}: strategy.robust = {config.strategy.robust} judges each client's update, and the server would "
            "see only their sum; leave out one of them"
        )
    if config.wire.upload_dtype != "fp32":
        raise StrategyError(
            f"{asked}: wire.upload-dtype = {config.wire.upload_dtype} rounds the change of factors, which sketches do "
            "not hold; set wire.upload-dtype = fp32, and wire.sketch-width for smaller uploads"
        )
    _check_stages(config, asked)


def _check_of_sums(strategy: Strategy, config: Config, asked: str) -> None:
    """Raises StrategyError if the mean of the clients' replies is not enough for this run.

    Args:
        strategy: the innermost one.
        config: the run's.
        asked: the setting for which the server sees no more than that, for the message.
    """
    if strategy.of_ideal and config.wire.sum == "none":
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, unless they are "
            "sketched; set wire.sum = sketch"
        )
    if not (strategy.of_ideal or strategy.of_mean or strategy.linear):
        known = {name: STRATEGIES.resolve(name) for name in NAMES}
        sums = sorted(name for name, cls in known.items() if cls.of_mean or cls.linear)
        sketched = sorted(name for name, cls in known.items() if cls.of_ideal)
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, and the server would see "
            f"only their mean; use {', '.join(sums)}, or with wire.sum = sketch {', '.join(sketched)}"
        )
    kind = kind_of(config)
    for wrong, why in (
        (
            config.privacy.level == "client",
            "privacy.level = client clips each client's change on the server, which sees none; set example or none",
        ),
        (
            config.strategy.robust != "none",
            f"strategy.robust = {config.strategy.robust} judges each client's update, and the server sees none",
        ),
        (
            config.strategy.correction != "none",
            f"strategy.correction = {config.strategy.correction} keeps sums of each client, and the server sees none",
        ),
        (
            bool(kind.others or kind.counted),
            f"lora.kind = {config.lora.kind} needs parts of each client by itself, and the server sees none",
        ),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")
    _check_stages(config, asked)


def check_edges(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if edges may not add up what their clients send in this run."""
    from ..wrappers.wrapper import innermost

    if config.wire.edges == "forward":
        return
    asked = "wire.edges = sum"
    for wrong, why in (
        (
            config.privacy.secure_sum,
            "privacy.secure-sum = true sums masked numbers, which edges carry as they are; set wire.edges = forward",
        ),
        (
            config.wire.sum == "sketch" and config.wire.sketch_passes == 2,
            "wire.sketch-passes = 2 asks each client a second question; set 1",
        ),
        (
            config.federation.schedule != "synchronous",
            f"federation.schedule = {config.federation.schedule} counts each update by its own age; set synchronous",
        ),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")
    _check_of_sums(innermost(strategy), config, asked)


def check_secure(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if the mean of the clients' replies is not enough for this run."""
    from ..wrappers.wrapper import innermost

    if not config.privacy.secure_sum:
        return
    inside, asked = innermost(strategy), "privacy.secure-sum = true"
    _check_of_sums(inside, config, asked)
    most = clients_per_round(config.federation.clients, config.federation.fraction)
    asks = next(filter(None, statistics(strategy, config.lora)), "")
    for wrong, why in (
        (most < 3, f"{most} clients take part in a round, expected at least 3, since each knows its own numbers"),
        (
            inside.of_ideal and config.wire.sketch_passes == 2,
            "set wire.sketch-passes = 1: from the sums of two passes the server could compute what a client sketched "
            "that is lost between them",
        ),
        (
            config.wire.upload_dtype != "fp32",
            f"wire.upload-dtype = {config.wire.upload_dtype} has scales of each client, and sums are of whole numbers; "
            "set fp32",
        ),
        (bool(asks), f"in round 0 clients would send {asks} in the clear; choose another lora.init or lora.allocation"),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")


def check_summed_ranks(strategy: Strategy, clients: Sequence[ClientInfo], config: Config) -> None:
    """Raises StrategyError if the mean of the replies does not say what these clients' unequal ranks would."""
    from ..wrappers.wrapper import innermost

    inside = innermost(strategy)
    unequal = len({client.all_ranks for client in clients}) > 1
    if not ((config.privacy.secure_sum or config.wire.edges == "sum") and unequal):
        return
    asked = "privacy.secure-sum = true" if config.privacy.secure_sum else "wire.edges = sum"
    ranks = sorted({client.rank for client in clients}, reverse=True)
    if kind_of(config).groups:
        raise StrategyError(
            f"{asked}: clients of lora.kind = {config.lora.kind} with ranks "
            f"{', '.join(map(str, ranks))} train different parts, and a sum does not say who sent which; give all "
            "clients one rank"
        )
    if not (inside.of_mean or inside.of_ideal):
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} averages a row over the clients that "
            f"have it, and a sum over ranks {', '.join(map(str, ranks))} does not say who has; give all clients one "
            "rank, or use fedavg-zeropad, or flexlora with wire.sum = sketch"
        )


def _check_stages(config: Config, asked: str) -> None:
    """Raises StrategyError if a privacy stage changes single replies on the server, which it would not see."""
    from fedlora.exchange.stages import Stage, stages

    for stage in stages(config.privacy):
        if type(stage).arriving is not Stage.arriving:
            raise StrategyError(
                f"{asked}: {type(stage).__name__} of privacy.stages changes each reply on the server, which would see "
                "only their sum; leave out one of them"
            )
