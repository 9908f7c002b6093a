"""A client's own model, of a strategy whose clients keep factors to themselves."""

from __future__ import annotations

from pathlib import Path

from fedlora.adapters import AdapterState, concatenate
from fedlora.exchange import ClientInfo

from ..clients.node import own_state
from ..strategies.base import ServerState, Strategy

_AFTER = 1_000_000  # a round after every round


def model(strategy: Strategy, state: ServerState, client: ClientInfo, folder: Path) -> AdapterState | None:
    """What the client would start its next round from, folds included, as one adapter on the untouched base.

    Args:
        strategy: with personal factors.
        state: after the last round.
        client: that holds no folds yet.
        folder: where it keeps its factors; see `own_state.folder_of`.

    Returns:
        None where it keeps none: it never trained, or not on this machine.
    """
    if own_state.load(folder, "personal", _AFTER) is None:
        return None
    sent = strategy.broadcast(state, client, _AFTER)
    own = own_state.with_personal_factors(sent, folder)
    return AdapterState(lora=concatenate((*sent.folds, AdapterState(lora=own.lora))).lora, tensors=own.tensors)
