"""Which clients mask with each other, and how many of a client's neighbours must open their shares."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from functools import lru_cache

from scipy.stats import hypergeom

# Up to this number of clients, everybody is everybody's neighbour.
EVERYBODY = 64
_SHARE = 2 / 3  # of a client's neighbours that must open their shares
# With more clients, the degree is such that a round fails, or colluding clients help the server to open what it must
# not, with at most this probability, as long as at most these shares of all clients drop out and collude.
_FAILURE = 2.0**-30
_DROPPING, _COLLUDING = 0.1, 0.1


def threshold_of(neighbours: int) -> int:
    """The number of shares t that give a client's secret back, by its number of neighbours k: two thirds.

    A server may tell some neighbours that a client has answered, and others that it has not. To open both of its
    secrets, it would then need 2 t shares from k neighbours, of whom only those that collude open two.
    """
    return math.ceil(_SHARE * neighbours)


def graph(clients: Sequence[int], seed: str) -> dict[int, tuple[int, ...]]:
    """Client id -> ids of its neighbours, ascending; j is a neighbour of i if i is one of j.

    Up to 64 clients it is the complete graph. Beyond, clients are put on a ring in a random order, and each is a
    neighbour of the next and the previous `degree / 2` on it (Bell et al. 2020, section 3.3, with a fixed number of
    neighbours).

    Args:
        clients: ids, without repetition.
        seed: of the order on the ring.
    """
    count = len(clients)
    if count <= EVERYBODY:
        return {client: tuple(sorted(set(clients) - {client})) for client in clients}
    ring = sorted(clients)
    random.Random(hashlib.sha256(f"fedlora ring {seed}".encode()).digest()).shuffle(ring)
    half = degree(count) // 2
    found: dict[int, tuple[int, ...]] = {}
    for place, client in enumerate(ring):
        near = {ring[(place + step) % count] for step in range(-half, half + 1)} - {client}
        found[client] = tuple(sorted(near))
    return found


@lru_cache(maxsize=64)
def degree(count: int) -> int:
    """The smallest even number of neighbours that is safe among so many clients; see the top of this file."""
    for even in range(2, count - 1, 2):
        needed = threshold_of(even)
        opened = hypergeom.sf(2 * needed - even - 1, count - 1, math.ceil(_COLLUDING * count), even)
        lost = hypergeom.sf(even - needed, count - 1, math.ceil(_DROPPING * count), even)
        if count * (opened + lost) <= _FAILURE:
            return even
    return count - 1 - (count - 1) % 2
