"""FedALT in dense matrices: tokens one by one, and clients one by one, without sums that own parts are taken out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def layer(x: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """What is added for each token of x [n, d_in]: its two updates as matrices, in the shares of its gate."""
    found = []
    for token in x.double():
        scores = [float(row @ token) for row in parts["G"].double()]
        top = max(scores)
        e = [2.718281828459045 ** (score - top) for score in scores]
        rest, own = (parts[up].double() @ parts[down].double() for up, down in (("D", "C"), ("B", "A")))
        found.append(scale * ((e[0] / sum(e)) * rest + (e[1] / sum(e)) * own) @ token)
    return torch.stack(found)


def mean_of_others(client: int, parts: Mapping[int, Tensor], rows: Mapping[int, int]) -> Tensor:
    """The mean of a part over all clients but this one, by their rows; zeros without any other."""
    others: Sequence[int] = [each for each in parts if each != client]
    if not others:
        return torch.zeros_like(parts[client])
    total = torch.zeros_like(parts[others[0]], dtype=torch.float64)
    for each in others:
        total = total + parts[each].double() * rows[each] / sum(rows[other] for other in others)
    return total.float()
