"""What a strategy returns, held against what it was given, before anything is made of it."""

from __future__ import annotations

from fedlora.adapters import not_finite
from fedlora.common.errors import StrategyError

from ..base import ServerState


class NotFiniteError(StrategyError):
    """A strategy's result that holds values that are not finite."""


def check(name: str, before: ServerState, after: object, round: int) -> ServerState:
    """The state that a strategy returned, if the next round can start from it.

    Args:
        name: the strategy's, as the user wrote it.
        before: what `aggregate` was given.
        after: what it returned.
        round: the round's number.

    Raises:
        NotFiniteError: a value is not finite.
        StrategyError: it is no state, or lacks a module, or a factor's shape is not the module's.
    """
    where = f"strategy.name = {name!r}: round {round}"
    if not isinstance(after, ServerState):
        raise StrategyError(f"{where}: aggregate returned {type(after).__name__}, expected a ServerState")
    odd = before.adapter.lora.keys() ^ after.adapter.lora.keys()
    if odd:
        raise StrategyError(
            f"{where}: aggregate returned other modules than it was given, for instance {min(odd)}; a module without "
            "replies stays as it was"
        )
    # folds of earlier rounds were looked at when they were new
    new = [fold for fold in after.folds.parts if not any(fold is old for old in before.folds.parts)]
    for part, adapter in (("adapter", after.adapter), *(("folds", fold) for fold in new)):
        for module, factors in adapter.lora.items():
            old = before.adapter.lora.get(module)
            d_out, d_in = (old.B.shape[0], old.A.shape[1]) if old else (factors.B.shape[0], factors.A.shape[-1])
            rank = factors.A.shape[0]
            if factors.A.shape != (rank, d_in) or factors.B.shape != (d_out, rank):
                raise StrategyError(
                    f"{where}: aggregate returned {module} in its {part} as A {list(factors.A.shape)} and B "
                    f"{list(factors.B.shape)}, expected [r, {d_in}] and [{d_out}, r]"
                )
        if bad := not_finite(adapter):
            raise NotFiniteError(f"{where}: aggregate returned values that are not finite, in {bad} of its {part}")
    return after
