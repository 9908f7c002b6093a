"""Ranks from the worth of every single rank, within a client's budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from fedlora.adapters import count_numbers
from fedlora.exchange import ClientInfo


def most_worth(
    client: ClientInfo, shapes: Mapping[str, tuple[int, int]], worth: Callable[[str, int], float], growth: float
) -> Mapping[str, int]:
    """The ranks that are worth most: each module has rank 1, and the best rank is added as long as the budget allows.

    Args:
        client: its own ranks are the budget: the number of ranks, and the numbers in the factors.
        shapes: module -> (d_out, d_in).
        worth: (module, i) -> what the rank i + 1 of a module is worth, for i from 0; it must not grow with i. With
            `score / (i + 1)`, ranks are in proportion to the scores (the method of D'Hondt).
        growth: largest rank of a module, as a multiple of the client's own.

    Returns:
        Module -> rank. Of two ranks of equal worth, the module that comes first in `shapes` gets its rank first.
    """
    own = {module: client.rank_of(module) for module in shapes}
    order = {module: place for place, module in enumerate(shapes)}
    most = {module: max(1, int(growth * rank)) for module, rank in own.items()}
    ranks = dict.fromkeys(shapes, 1)
    left, numbers = sum(own.values()) - len(own), count_numbers(own, shapes) - count_numbers(ranks, shapes)
    waiting = [(-worth(module, 1), 1, order[module], module) for module in shapes if most[module] > 1]
    heapq.heapify(waiting)
    while waiting and left:
        _, rank, place, module = heapq.heappop(waiting)
        if sum(shapes[module]) > numbers:
            continue  # a smaller module may still fit
        ranks[module] = rank + 1
        left, numbers = left - 1, numbers - sum(shapes[module])
        if rank + 1 < most[module]:
            heapq.heappush(waiting, (-worth(module, rank + 1), rank + 1, place, module))
    return ranks
