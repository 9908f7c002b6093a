"""Checks that all clients use the same names of classes, since a number must mean the same class on every node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedlora.exchange import ClientInfo

_MOST = 8  # largest number of names in a message


def disagreeing(infos: Mapping[int, ClientInfo], own: Sequence[str] | None) -> dict[int, str]:
    """The clients that cannot take part because their classes have other names: client id -> reason.

    Args:
        infos: the descriptions of all clients.
        own: the names in the server's own rows, empty if these have only numbers; None if the server reads no rows. In
            that case, clients must have the names that most clients have; if there is a tie, those of the lowest id.
    """
    said = {client: info.class_names for client, info in sorted(infos.items())}
    if own is not None:
        common, whose = tuple(own), "the server"
    else:
        common, whose = next(iter(Counter(said.values()).most_common(1)), ((), 0))[0], "most others"
    return {
        client: f"client {client} calls its classes {_shown(names)}, but {whose} {_shown(common)}; set the run's "
        "data.label-names to one list for all"
        for client, names in said.items()
        if names != common
    }


def out_of_order(head: Sequence[str], rows: Sequence[str]) -> str:
    """The reason why a model's own head does not fit, if it has the rows' classes in another order; otherwise empty.

    Args:
        head: names of the classes of the model's head.
        rows: names of the classes in the rows.
    """
    mine, theirs = ([name.casefold() for name in names] for names in (head, rows))
    if mine == theirs or sorted(mine) != sorted(theirs):
        return ""
    return (
        f"model.head = 'keep': the model's own head has the classes in the order {_shown(head)}, but the rows have "
        f"{_shown(rows)}; set data.label-names = {', '.join(rows[theirs.index(name)] for name in mine)!r}, or "
        "model.head = 'fresh'"
    )


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "by numbers"
    more = f", … ({len(names)})" if len(names) > _MOST else ""
    return f"({', '.join(names[:_MOST])}{more})"
