"""Adapters that start anew after a fold."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from fedlora.adapters import AdapterState, initial
from fedlora.exchange import ClientInfo

from ..base import ServerState


def unscaled(state: ServerState, client: ClientInfo) -> ServerState:
    """The state with this client's scaling and unchanged A, for adapters with B = 0.

    Since the update is zero whatever the scaling, A needs no conversion and is sent as it was drawn.
    """
    lora = {name: replace(f, scaling=client.scaling_of(name)) for name, f in state.adapter.lora.items()}
    return replace(state, adapter=replace(state.adapter, lora=lora))


def restart(adapter: AdapterState, seed: int, number: int) -> AdapterState:
    """A new adapter of the same shapes, ranks and scalings: a random A that depends on seed and round, and B = 0."""
    lora = adapter.lora
    # torch seeds its CPU generator with the low 32 bits alone, so both numbers must be mixed into them
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return initial(
        shapes={name: (f.B.shape[0], f.A.shape[1]) for name, f in lora.items()},
        ranks={name: f.rank for name, f in lora.items()},
        scalings={name: f.scaling for name, f in lora.items()},
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")),
    )
