"""What a client's upload becomes in a coarse number format, and what it leaves out for the next one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraFactors, relative_error, without_cores
from fedlora.codec import difference, sum_of, through
from fedlora.exchange import Broadcast

from . import own_state

_KIND = "left-out"


def coded(adapter: AdapterState, broadcast: Broadcast, number_format: str, folder: Path) -> tuple[AdapterState, float]:
    """What to send for a trained adapter, and the error that this adds.

    The change since the broadcast, with what the last reply left out, where the broadcast says that factors keep
    their meaning; what this reply leaves out is kept in the client's folder. A reply that is lost on the way
    counts as sent.

    Args:
        adapter: as trained.
        broadcast: that the training started from.
        number_format: one of `codec.FORMATS`; fp32 sends the adapter as it is.
        folder: the client's own.

    Returns:
        The adapter for `wire.encode_update`, and `|received - trained|_F / |trained|_F` of the effective updates.
    """
    if number_format == "fp32":
        return adapter, 0.0
    start = broadcast.adapter
    wanted = difference(_uploaded(adapter, broadcast.upload), start)
    steady = broadcast.steady and broadcast.task == "train"
    kept = own_state.load(folder, _KIND, broadcast.round) if steady else None
    if kept is not None:
        wanted = _with_left_out(wanted, kept)
    arrived = through(wanted, number_format)
    if steady:
        own_state.save(folder, _KIND, _merged(difference(wanted, arrived), kept), broadcast.round)
    received = _completed(sum_of(arrived, start), adapter)
    return wanted, relative_error(without_cores(received).lora, without_cores(adapter).lora)


def _uploaded(adapter: AdapterState, upload: frozenset[str]) -> AdapterState:
    """The factors that are sent; the others empty."""
    nothing = torch.empty(0, 0)
    lora = {
        name: LoraFactors(A=f.A if "A" in upload else nothing, B=f.B if "B" in upload else nothing, scaling=f.scaling)
        for name, f in adapter.lora.items()
    }
    return AdapterState(lora=lora, dense=adapter.dense)


def _with_left_out(wanted: AdapterState, kept: AdapterState) -> AdapterState:
    """The sum, where the client still has the rank that it had."""

    def add(tensor: Tensor, left: Tensor | None) -> Tensor:
        return tensor + left if left is not None and left.shape == tensor.shape else tensor

    lora = dict(wanted.lora)
    for name, f in wanted.lora.items():
        left = kept.lora.get(name)
        lora[name] = LoraFactors(A=add(f.A, left and left.A), B=add(f.B, left and left.B), scaling=f.scaling)
    return AdapterState(lora=lora, dense={name: add(t, kept.dense.get(name)) for name, t in wanted.dense.items()})


def _merged(left: AdapterState, kept: AdapterState | None) -> AdapterState:
    """What is left out now, and of factors that were not sent this time what was left out before."""
    if kept is None:
        return left
    lora = dict(left.lora)
    for name, f in left.lora.items():
        old = kept.lora.get(name, f)
        lora[name] = LoraFactors(A=f.A if f.A.numel() else old.A, B=f.B if f.B.numel() else old.B, scaling=f.scaling)
    return AdapterState(lora=lora, dense=left.dense)


def _completed(received: AdapterState, trained: AdapterState) -> AdapterState:
    """The update as the server sees it; a factor that was not sent is no coding's fault."""
    lora = {
        name: LoraFactors(
            A=f.A if f.A.numel() else trained.lora[name].A,
            B=f.B if f.B.numel() else trained.lora[name].B,
            scaling=f.scaling,
        )
        for name, f in received.lora.items()
    }
    return AdapterState(lora=lora, dense=received.dense)
