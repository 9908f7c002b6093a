"""Whether a run's adapter kind fits what else its configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError

if TYPE_CHECKING:
    from fedlora.adapters.kinds.base import AdapterKind
    from fedlora.config import Config


def kind_of(config: Config) -> AdapterKind:
    """The run's adapter kind.

    Raises:
        StrategyError: it needs the base's own weights, and the clients may change them; or its update has no factors,
            and the config asks for what needs them; or the penalty is of a product that it lacks; or it adds a term to
            the loss in each of several passes.
    """
    from fedlora.adapters.kinds.registry import KINDS

    name = config.lora.kind
    kind = KINDS.make(name, config.lora.kind_options)
    if kind.needs_weight and config.anchor.base_update == "merge":
        raise StrategyError(
            f"anchor.base-update = merge: lora.kind = {name} needs the base's own weights, into which clients would "
            "merge folds; set anchor.base-update = anchor"
        )
    if kind.adds_to_loss and config.train.accumulate > 1:
        raise StrategyError(
            f"train.accumulate = {config.train.accumulate}: lora.kind = {name} adds its own term to the loss once for "
            "each pass, which would count it so many times in a step; set train.accumulate = 1, or leave the term out "
            "(for mixlora, lora.kind-options = balance=0)"
        )
    if config.train.prox_mu and config.train.prox_of == "update" and not kind.pairs:
        raise StrategyError(
            f"train.prox-of = update: lora.kind = {name} has no factors A and B, whose product the penalty is of; "
            "set train.prox-of = factors, which takes the kind's own parts, or lora.kind = lora"
        )
    if not (kind.factored and kind.matrix) and config.evaluate.intruders:
        raise StrategyError(
            f"evaluate.intruders: the update of lora.kind = {name} has no factors, whose directions could be counted; "
            "set evaluate.intruders = false"
        )
    return kind
