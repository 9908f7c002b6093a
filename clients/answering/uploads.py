"""A client's upload in a coarse number format, and the error feedback, which adds what it left out to the next one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.profiler import record_function

from fedlora.adapters import AdapterState, fill_missing, keep_factors, map_tensors, relative_error
from fedlora.adapters.state import difference, sum_of
from fedlora.exchange import Broadcast
from fedlora.exchange.codec import SPARSE, largest, round_trip

from ..node import own_state

_KIND = "left-out"


def encode_upload(
    adapter: AdapterState,
    broadcast: Broadcast,
    number_format: str,
    folder: Path,
    *,
    density: float = 1.0,
    keep: int = 2,
) -> tuple[AdapterState, float]:
    """The upload for a trained adapter, and the error that its number format adds.

    In formats other than fp32, the upload is the change since the broadcast. If the broadcast's strategy is steady,
    what the last reply left out is added to it, and what this reply leaves out is stored in the client's folder. A
    reply that is lost on the way counts as sent.

    Args:
        adapter: the adapter after training.
        broadcast: the message from which the training started.
        number_format: one of `codec.FORMATS`; with fp32, the adapter itself is sent.
        folder: the client's own folder.
        density: with the format sparse, the share of the entries that are sent.
        keep: number of rounds whose files are kept; see `own_state.save`.

    Returns:
        The adapter for `wire.encode_update`, and `|received - trained|_F / |trained|_F` of the updates.
    """
    if number_format == "fp32":
        return broadcast.plan.sent_back(adapter), 0.0
    with record_function("fedlora/codec"):
        start = broadcast.adapter
        wanted = difference(keep_factors(broadcast.plan.sent_back(adapter), broadcast.plan.send), start)
        kept = own_state.load(folder, _KIND, broadcast.round) if broadcast.steady else None
        if kept is not None:
            wanted = _with_left_out(wanted, kept)
        sent = largest(wanted, density) if number_format == SPARSE else wanted
        arrived = round_trip(sent, number_format)
        if broadcast.steady:
            left = difference(wanted, arrived)
            # for what is not sent this time, what it left out before is kept
            own_state.save(folder, _KIND, left if kept is None else _over(kept, left), broadcast.round, keep=keep)
        received = _over(adapter, sum_of(arrived, start))  # what is not sent does not count as an error
        return sent, relative_error(received.lora, adapter.lora)


def _over(before: AdapterState, new: AdapterState) -> AdapterState:
    """What is new, and what was before of the modules, factors and tensors that are not in it."""
    filled = fill_missing(new, before)
    return AdapterState(lora={**before.lora, **filled.lora}, tensors={**before.tensors, **filled.tensors})


def _with_left_out(wanted: AdapterState, kept: AdapterState) -> AdapterState:
    """`wanted + kept`, where the shapes are equal; they differ if the client's rank has changed."""

    def add(name: str, tensor: Tensor, left: Tensor | None) -> Tensor:
        return tensor + left if left is not None and left.shape == tensor.shape else tensor

    return map_tensors(add, wanted, kept)
