"""The folds that this process has of each run, by base version. All clients in the process share them."""

from __future__ import annotations

from fedlora.adapters import AdapterState
from fedlora.adapters.folds import Folds
from fedlora.common.errors import FedLoraError
from fedlora.exchange import Broadcast

# Before a resident client is this many versions behind, the server has compacted the folds or sends them all. Versions
# share their tensors, so that one more version costs only its newest fold.
_VERSIONS_KEPT = 32
_held: dict[tuple[int, int], tuple[AdapterState, ...]] = {}


class StaleBase(FedLoraError):
    """The client no longer has the folds on which the server's message builds; the server then sends all of them."""


def hold(run_id: int, folds: Folds) -> None:
    """Hold a run's folds, as this process would if it had received them one by one."""
    for version in range(folds.first, folds.version + 1):
        _held[(run_id, version)] = folds.parts[: version - folds.first + 1]


def folds_up_to(run_id: int, broadcast: Broadcast) -> tuple[AdapterState, ...]:
    """All folds up to the broadcast's base version, in order. They stay in memory for the next message.

    Args:
        run_id: number of the run.
        broadcast: the message, with the folds that the server believes to be missing here.

    Raises:
        StaleBase: the version that the broadcast continues is not in memory.
    """
    if broadcast.base_version == 0:
        return ()
    known = () if broadcast.folds_from == 0 else _held.get((run_id, broadcast.folds_from))
    if known is None:
        raise StaleBase(f"base version {broadcast.folds_from} is not in memory here")
    folds = (*known, *broadcast.folds)
    # The server never continues a version before the first one of its folds: those were compacted, or replaced.
    first = broadcast.base_version - len(folds) + 1
    for key in [key for key in _held if key[0] == run_id and key[1] < first]:
        del _held[key]
    _held[(run_id, broadcast.base_version)] = folds
    while len(_held) > _VERSIONS_KEPT:
        del _held[next(iter(_held))]
    return folds
