"""Who is asked: drawn at random from the seed and the round, and looked at no further than it takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence


def drawn(
    clients: Sequence[int],
    count: int,
    draw: random.Random,
    awake: Callable[[int], bool],
    free: Callable[[int], bool] = lambda client: True,
) -> tuple[list[int], list[int]]:
    """Free clients whose devices are there, and some whose devices sleep, in the order in which they were drawn.

    If all are free and awake, the former are `draw.sample(clients, count)`.

    Args:
        clients: each occurs once.
        count: the largest number of each.
        draw: the random numbers.
        awake: whether a client's device is there.
        free: whether a client may be asked at all.
    """
    there: list[int] = []
    asleep: list[int] = []
    for client in in_random_order(clients, count, draw):
        if len(there) >= count:
            break
        if not free(client):
            continue
        if awake(client):
            there.append(client)
        elif len(asleep) < count:
            asleep.append(client)
    return there, asleep


def in_random_order(clients: Sequence[int], first: int, draw: random.Random) -> Iterator[int]:
    """All clients in a random order, which is drawn no further than it is asked for.

    Args:
        clients: each occurs once.
        first: the first so many clients are `draw.sample(clients, first)`.
        draw: the random numbers.
    """
    drawn = draw.sample(clients, min(max(0, first), len(clients)))
    yield from drawn
    seen = {*drawn}
    while 2 * len(seen) < len(clients):
        if (client := draw.choice(clients)) not in seen:
            seen.add(client)
            yield client
    rest = [client for client in clients if client not in seen]
    draw.shuffle(rest)
    yield from rest
