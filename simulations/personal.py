"""A client's own model, for strategies with personal factors, which stay on their client."""

from __future__ import annotations

from pathlib import Path

from fedlora.adapters import AdapterState, concatenate
from fedlora.exchange import ClientInfo

from ..clients.node import own_state
from ..strategies.base import ServerState, Strategy

_AFTER = 1_000_000  # a round after all others


def model(strategy: Strategy, state: ServerState, client: ClientInfo, folder: Path) -> AdapterState | None:
    """The adapter from which the client would start its next round, as one adapter for the unchanged base model.

    Args:
        strategy: a strategy with personal factors.
        state: the server's state after the last round.
        client: the client, without folds, so that all folds become part of the adapter.
        folder: the folder with the client's personal factors; see `own_state.folder_of`.

    Returns:
        The adapter, folds included; None if the folder has no personal factors, because the client never trained or
        trained on another machine.
    """
    if own_state.load(folder, "personal", _AFTER) is None:
        return None
    sent = strategy.broadcast(state, client, _AFTER)
    own = own_state.with_personal_factors(sent, folder)
    return AdapterState(lora=concatenate((*sent.folds, AdapterState(lora=own.lora))).lora, tensors=own.tensors)
