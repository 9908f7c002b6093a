"""What clients call their classes: one list for all of them, or a number would mean another thing on every node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedlora.exchange import ClientInfo

_MOST = 8  # names that a sentence lists


def disagreeing(infos: Mapping[int, ClientInfo], own: Sequence[str] | None) -> dict[int, str]:
    """Why clients cannot take part whose classes are called otherwise than the others', by client id.

    Args:
        infos: of all clients.
        own: what the server calls them in its own rows, nothing where it has numbers; None where it reads no rows.
            The clients are then held against most of them, of as many against those with the lowest id.
    """
    said = {client: info.class_names for client, info in sorted(infos.items())}
    if own is not None:
        common, whose = tuple(own), "the server"
    else:
        common, whose = next(iter(Counter(said.values()).most_common(1)), ((), 0))[0], "most others"
    return {
        client: f"client {client} calls its classes {_shown(names)}, {whose} {_shown(common)}; set data.label-names of "
        "the run to one list for all"
        for client, names in said.items()
        if names != common
    }


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "by numbers"
    more = f", … ({len(names)})" if len(names) > _MOST else ""
    return f"({', '.join(names[:_MOST])}{more})"
