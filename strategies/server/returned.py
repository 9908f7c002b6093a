"""The check of the state that a strategy returns, before it is used."""

from __future__ import annotations

from fedlora.adapters import not_finite
from fedlora.common.errors import StrategyError

from ..base import ServerState


class NotFiniteError(StrategyError):
    """A strategy's result has values that are not finite."""


def check(name: str, before: ServerState, after: object, number: int) -> ServerState:
    """The state that a strategy returned, after a check that the next round can start from it.

    Args:
        name: name of the strategy, as the user wrote it.
        before: the state that `aggregate` was given.
        after: the result of `aggregate`.
        number: number of the round.

    Raises:
        NotFiniteError: a value is not finite.
        StrategyError: the result is not a state, it has other modules, or the shape of a factor is wrong.
    """
    where = f"strategy.name = {name!r}: round {number}"
    if not isinstance(after, ServerState):
        raise StrategyError(f"{where}: aggregate returned {type(after).__name__}, expected a ServerState")
    odd = before.adapter.lora.keys() ^ after.adapter.lora.keys()
    if odd:
        raise StrategyError(
            f"{where}: aggregate returned other modules than it was given, for instance {min(odd)}; keep modules "
            "without replies as they were"
        )
    # folds of earlier rounds were checked when they were new
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
