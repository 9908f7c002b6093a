"""Which clients are refused for what they call their classes, and what a name may be on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.common.errors import WireError
from fedlora.exchange import ClientInfo, wire
from fedlora.strategies.server.classes import disagreeing, out_of_order

AB, BA = ("a", "b"), ("b", "a")


def infos(*names: tuple[str, ...]) -> dict[int, ClientInfo]:
    return {client: ClientInfo(client_id=client, rank=2, class_names=found) for client, found in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "own", "refused"),
    [
        ((AB, AB, AB), None, []),
        ((AB, BA, AB), None, [1]),
        ((BA, AB, AB), None, [0]),
        ((AB, BA), None, [1]),
        ((AB, BA), BA, [0]),
        ((AB, AB), (), [0, 1]),
        (((), ()), (), []),
        ((AB, ()), None, [1]),
        ((), None, []),
    ],
)
def test_who_is_refused(names: tuple[tuple[str, ...], ...], own: tuple[str, ...] | None, refused: list[int]) -> None:
    said = disagreeing(infos(*names), own)
    assert list(said) == refused
    assert all("data.label-names" in reason for reason in said.values())


def test_the_order_of_arrival_does_not_matter() -> None:
    met = infos(AB, BA)
    assert disagreeing(dict(reversed(met.items())), None) == disagreeing(met, None)


def test_a_long_list_is_shown_in_part() -> None:
    many = tuple(f"c{number}" for number in range(100))
    (reason,) = disagreeing(infos(many), AB).values()
    assert "client 0 calls its classes (c0, c1, c2, c3, c4, c5, c6, c7, … (100)), but the server (a, b)" in reason


@pytest.mark.parametrize(
    ("head", "rows", "says"),
    [
        (("NO", "YES"), ("yes", "no"), "data.label-names = 'no, yes', or model.head = 'fresh'"),
        (("NO", "YES"), ("no", "yes"), ""),
        (("NO", "YES"), ("good", "bad"), ""),
        (("NO", "YES"), (), ""),
        ((), ("no", "yes"), ""),
    ],
)
def test_a_heads_own_order(head: tuple[str, ...], rows: tuple[str, ...], says: str) -> None:
    said = out_of_order(head, rows)
    assert (says in said) if says else not said


def test_names_travel() -> None:
    info = ClientInfo(client_id=1, rank=2, class_names=("bénin", "malin"))
    assert wire.decode_info(wire.encode_info(info, "base"), "base", "client 1") == info


@pytest.mark.parametrize("names", [["a" * 65], [""], ["a\nb"], ["a\x1b[0m"], ["a"] * 4097])
def test_names_that_are_none_are_refused(names: list[Any]) -> None:
    record = wire.encode_info(ClientInfo(client_id=1, rank=2, class_names=tuple(names)), "base")
    with pytest.raises(WireError, match=r"client 1 sent class-names .*, expected at most 4096 names of at most 64"):
        wire.decode_info(record, "base", "client 1")
