"""Whether a correction of the clients' drift is sound in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError

if TYPE_CHECKING:
    from fedlora.config import Config


def check_correction(config: Config) -> None:
    """Raises StrategyError if something else changes what the correction has added up over rounds."""
    chosen = config.strategy
    others = {
        "strategy.server-optimizer": chosen.server_optimizer != "none",
        "strategy.restart-every": chosen.restart_every > 0,
        "train.layers-per-round": config.train.layers_per_round > 0,
        "privacy.stages": bool(config.privacy.stages),
        "privacy.level = client": config.privacy.level == "client",
    }
    for key, is_set in others.items():
        if is_set:
            raise StrategyError(
                f"strategy.correction = {chosen.correction} adds up changes over rounds, which {key} changes again; "
                "leave out one of them"
            )
    if chosen.correction == "feddyn" and chosen.robust in ("median", "trimmed-mean"):
        raise StrategyError(
            f"strategy.correction = feddyn counts the replies of a round, and strategy.robust = {chosen.robust} makes "
            "one reply of all; set strategy.robust = norm-bound, krum or multi-krum"
        )


def check_scaffold(config: Config) -> None:
    """Raises StrategyError if the server could not tell from the replies what clients remember of their gradients."""
    if config.train.optimizer != "sgd":
        raise StrategyError(
            "strategy.correction = scaffold takes what a client's steps add up to, over their rates, for its mean "
            f"gradient, which is so for plain SGD alone, and train.optimizer = {config.train.optimizer}; set "
            "train.optimizer = sgd, or strategy.correction = feddyn"
        )
    if config.strategy.robust != "none":
        raise StrategyError(
            f"strategy.correction = scaffold adds up what each client sends, and strategy.robust = "
            f"{config.strategy.robust} takes some of it away; leave out one of them"
        )
    if config.wire.dtype != "fp32":
        raise StrategyError(
            "strategy.correction = scaffold needs the same c on the server and on clients, and wire.dtype = "
            f"{config.wire.dtype} rounds it on the way; set wire.dtype = fp32"
        )
