"""What strategies read from a round's replies: means that run as replies arrive, or all factors by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fedlora.adapter import LoraFactors, running_mean
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
        StrategyError: there are none, or one counts for nothing.
    """
    empty = True
    for update in updates:
        empty = False
        if not update.num_examples > 0:
            raise StrategyError(
                f"round {round}: client {update.client_id} sent num_examples = {update.num_examples}, expected > 0"
            )
        yield update
    if empty:
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
