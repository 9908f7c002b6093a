"""What strategies read from a round's replies: means that run as replies arrive, or all factors by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import LoraFactors, running_mean, wide
from fedlora.errors import StrategyError
from fedlora.exchange import ClientUpdate


class Means:
    """Weighted means of tensors by name, each over the clients that sent it; memory for one tensor per name."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, tensor: Tensor, update: ClientUpdate) -> None:
        """Counts a tensor of this update, weighted by the client's examples.

        Raises:
            StrategyError: its shape differs from the earlier ones'; nothing is ever broadcast.
        """
        so_far = self.values.get(name)
        if so_far is not None and so_far.shape != tensor.shape:
            raise StrategyError(
                f"{name}: client {update.client_id} sent shape {list(tensor.shape)}, others sent "
                f"{list(so_far.shape)}; every client must train the same modules of the same base model"
            )
        weight = self._weights.get(name, 0) + update.num_examples
        self._weights[name] = weight
        self.values[name] = running_mean(so_far, tensor, update.num_examples / weight)


class RankMeans:
    """Weighted means of factors of unequal ranks, row by row: memory for one tensor per name.

    Args:
        zero_pad: True fills smaller ranks up with zeros, so that every client counts in every row; False takes
            each row's mean over the clients that have it.
    """

    def __init__(self, zero_pad: bool) -> None:
        self.values: dict[str, Tensor] = {}
        self._zero_pad = zero_pad
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, rows: Tensor, update: ClientUpdate) -> None:
        """Counts the rows of one client: A [r, d_in], or B' [r, d_out], weighted by its examples.

        Raises:
            StrategyError: their length differs from the earlier ones'.
        """
        so_far = self.values.get(name, wide(rows).new_zeros(0, rows.shape[1]))
        weights = self._weights.get(name, torch.zeros(0, dtype=torch.float64))
        if so_far.shape[1] != rows.shape[1]:
            raise StrategyError(
                f"{name}: client {update.client_id} sent rows of {rows.shape[1]}, others of {so_far.shape[1]}; "
                "every client must train the same modules of the same base model"
            )
        rank, n = len(rows), update.num_examples
        if rank > len(so_far):
            grown = rank - len(so_far)
            earlier = float(weights[0]) if self._zero_pad and len(weights) else 0.0
            so_far = torch.cat([so_far, so_far.new_zeros(grown, rows.shape[1])])
            weights = torch.cat([weights, torch.full((grown,), earlier, dtype=torch.float64)])
        if self._zero_pad:
            weights = weights + n
            share = n / float(weights[0])
            so_far[:rank].lerp_(rows.to(so_far), share)
            so_far[rank:].mul_(1.0 - share)
        else:
            weights[:rank] += n
            shares = (n / weights[:rank]).to(so_far)[:, None].expand_as(rows)
            so_far[:rank].lerp_(rows.to(so_far), shares)
        self.values[name], self._weights[name] = so_far, weights


@dataclass(frozen=True)
class Parts:
    """One module's factors from all clients that sent it, by ascending client id.

    Args:
        factors: one per client.
        shares: p_k = n_k / sum(n) over these clients.
    """

    factors: list[LoraFactors]
    shares: list[float]


def arrivals(updates: Iterable[ClientUpdate], round: int) -> Iterator[ClientUpdate]:
    """The replies one by one, as they come.

    Raises:
        StrategyError: there are none, one counts for nothing, or a client replied twice.
    """
    seen: set[int] = set()
    for update in updates:
        if update.client_id in seen:
            raise StrategyError(f"round {round}: client {update.client_id} replied twice; each counts once")
        seen.add(update.client_id)
        if not update.num_examples > 0:
            raise StrategyError(
                f"round {round}: client {update.client_id} sent num_examples = {update.num_examples}, expected > 0"
            )
        yield update
    if not seen:
        raise StrategyError(f"round {round}: no client's reply arrived, so there is nothing to aggregate")


def gather(updates: Iterable[ClientUpdate], round: int) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """All factors by module, and the means of the dense tensors.

    Holds every reply's factors, for methods that need them together. Sorted by client id, so that the
    order of arrival does not show in the last bits of what is made of them.
    """
    kept: dict[str, list[tuple[int, int, LoraFactors]]] = {}
    dense = Means()
    for update in arrivals(updates, round):
        for name, factors in update.adapter.lora.items():
            kept.setdefault(name, []).append((update.client_id, update.num_examples, factors))
        for name, tensor in update.adapter.dense.items():
            dense.add(name, tensor, update)
    parts: dict[str, Parts] = {}
    for name, entries in kept.items():
        entries.sort(key=lambda entry: entry[0])
        examples = sum(n for _, n, _ in entries)
        parts[name] = Parts([factors for _, _, factors in entries], [n / examples for _, n, _ in entries])
    return parts, dense.values
