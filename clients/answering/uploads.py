"""What a client's upload becomes in a coarse number format, and what it leaves out for the next one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.profiler import record_function

from fedlora.adapters import AdapterState, fill_missing, keep_factors, map_tensors, relative_error
from fedlora.adapters.state import difference, sum_of
from fedlora.exchange import Broadcast
from fedlora.exchange.codec import round_trip

from ..node import own_state

_KIND = "left-out"


def encode_upload(
    adapter: AdapterState, broadcast: Broadcast, number_format: str, folder: Path, keep: int = 2
) -> tuple[AdapterState, float]:
    """What to send for a trained adapter, and the error that this adds.

    The change since the broadcast, with what the last reply left out, where the broadcast says that factors keep
    their meaning; what this reply leaves out is kept in the client's folder. A reply that is lost on the way
    counts as sent.

    Args:
        adapter: as trained.
        broadcast: that the training started from.
        number_format: one of `codec.FORMATS`; fp32 sends the adapter as it is.
        folder: the client's own.
        keep: see `own_state.save`.

    Returns:
        The adapter for `wire.encode_update`, and `|received - trained|_F / |trained|_F` of the effective updates.
    """
    if number_format == "fp32":
        return broadcast.plan.sent_back(adapter), 0.0
    with record_function("fedlora/codec"):
        start = broadcast.adapter
        wanted = difference(keep_factors(broadcast.plan.sent_back(adapter), broadcast.plan.send), start)
        steady = broadcast.steady and broadcast.job == "train"
        kept = own_state.load(folder, _KIND, broadcast.round) if steady else None
        if kept is not None:
            wanted = _with_left_out(wanted, kept)
        arrived = round_trip(wanted, number_format)
        if steady:
            left = difference(wanted, arrived)
            # factors that are not sent this time keep what they left out before
            own_state.save(
                folder, _KIND, left if kept is None else fill_missing(left, kept), broadcast.round, keep=keep
            )
        received = fill_missing(sum_of(arrived, start), adapter)  # a factor that is not sent is no coding's fault
        return wanted, relative_error(received.lora, adapter.lora)


def _with_left_out(wanted: AdapterState, kept: AdapterState) -> AdapterState:
    """The sum, where the client still has the rank that it had."""

    def add(name: str, tensor: Tensor, left: Tensor | None) -> Tensor:
        return tensor + left if left is not None and left.shape == tensor.shape else tensor

    return map_tensors(add, wanted, kept)
