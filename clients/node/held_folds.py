"""The folds that this process holds of each run, by base version: all of its clients share them."""

from __future__ import annotations

from fedlora.adapters import AdapterState
from fedlora.common.errors import FedLoraError
from fedlora.exchange import Broadcast

# More than a resident client is ever behind before the server compacts or resends; tensors are shared
# between versions, so that holding one costs its newest fold.
_VERSIONS_KEPT = 32
_held: dict[tuple[int, int], tuple[AdapterState, ...]] = {}


class StaleBase(FedLoraError):
    """The client no longer holds the folds that the server's message builds on; the server sends them all."""


def folds_up_to(run_id: int, broadcast: Broadcast) -> tuple[AdapterState, ...]:
    """All folds up to the broadcast's base version, in order; remembered for the next message.

    Raises:
        StaleBase: the version that the broadcast continues is not held.
    """
    if broadcast.base_version == 0:
        return ()
    known = () if broadcast.folds_from == 0 else _held.get((run_id, broadcast.folds_from))
    if known is None:
        raise StaleBase(f"base version {broadcast.folds_from} is not held here")
    folds = (*known, *broadcast.folds)
    # The server continues no version from before the first that its folds lead to: they were compacted, or replaced.
    first = broadcast.base_version - len(folds) + 1
    for key in [key for key in _held if key[0] == run_id and key[1] < first]:
        del _held[key]
    _held[(run_id, broadcast.base_version)] = folds
    while len(_held) > _VERSIONS_KEPT:
        del _held[next(iter(_held))]
    return folds
