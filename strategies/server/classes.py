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


def out_of_order(head: Sequence[str], rows: Sequence[str]) -> str:
    """Why a run cannot begin with a model's own head that has the rows' classes in another order; empty otherwise.

    Args:
        head: what the model calls the classes of its head.
        rows: what the rows call theirs.
    """
    mine, theirs = ([name.casefold() for name in names] for names in (head, rows))
    if mine == theirs or sorted(mine) != sorted(theirs):
        return ""
    return (
        f"model.head = 'keep': the model's own head has the classes in the order {_shown(head)}, the rows in that of "
        f"{_shown(rows)}; set data.label-names = {', '.join(rows[theirs.index(name)] for name in mine)!r}, or "
        "model.head = 'fresh'"
    )


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "by numbers"
    more = f", … ({len(names)})" if len(names) > _MOST else ""
    return f"({', '.join(names[:_MOST])}{more})"
