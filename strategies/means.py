"""What strategies read from a round's replies: means that run as replies arrive, or all factors by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import LoraFactors, at_once, wide
from fedlora.errors import StrategyError
from fedlora.exchange import ClientUpdate


class Means:
    """Weighted means of tensors by name, each over the clients that sent it; memory for one tensor per name."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, tensors: Mapping[str, Tensor], update: ClientUpdate) -> None:
        """Counts these tensors of an update, weighted by the client's examples.

        All tensors move in one call, so that it takes little more than reading them.

        Raises:
            StrategyError: a shape differs from the earlier ones'; nothing is ever broadcast.
        """
        steps = _Steps()
        for name, tensor in tensors.items():
            so_far = self.values.get(name)
            weight = self._weights.get(name, 0) + update.num_examples
            self._weights[name] = weight
            if so_far is None:
                self.values[name] = wide(tensor).clone()
                continue
            if so_far.shape != tensor.shape:
                raise StrategyError(
                    f"{name}: client {update.client_id} sent shape {list(tensor.shape)}, others sent "
                    f"{list(so_far.shape)}; every client must train the same modules of the same base model"
                )
            steps.towards(so_far, tensor, update.num_examples / weight)
        steps.take()


class RankMeans:
    """Weighted means of factors of unequal ranks, row by row: memory for one tensor per name.

    Args:
        axis: that of the rank: 0 for A [r, d_in], 1 for B [d_out, r].
        zero_pad: True fills smaller ranks up with zeros, so that every client counts in every row; False takes
            each row's mean over the clients that have it.
    """

    def __init__(self, axis: int, zero_pad: bool) -> None:
        self.values: dict[str, Tensor] = {}
        self._axis, self._zero_pad = axis, zero_pad
        # Rows before each end weigh alike: [(end, weight)], by ascending end.
        self._weights: dict[str, list[tuple[int, float]]] = {}

    def add(self, factors: Mapping[str, Tensor], update: ClientUpdate) -> None:
        """Counts one factor of each module, weighted by the client's examples; as fast as `Means.add`.

        Raises:
            StrategyError: the other dimension differs from the earlier ones'.
        """
        steps = _Steps()
        for name, factor in factors.items():
            rank, n = factor.shape[self._axis], update.num_examples
            so_far = self._room(name, factor, update)
            ends, begin = [], 0
            for end, weight in self._weights[name]:
                if begin < rank:
                    cut = min(end, rank)
                    share = n / (weight + n)
                    steps.towards(self._rows(so_far, begin, cut), self._rows(factor, begin, cut), share)
                    ends.append((cut, weight + n))
                if end > rank and self._zero_pad:
                    steps.fade(self._rows(so_far, max(begin, rank), end), n / (weight + n))
                if end > rank:
                    ends.append((end, weight + n if self._zero_pad else weight))
                begin = end
            self._weights[name] = ends
        steps.take()

    def _rows(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        return tensor.narrow(self._axis, begin, end - begin)

    def _room(self, name: str, factor: Tensor, update: ClientUpdate) -> Tensor:
        """The mean so far, grown to the factor's rank by rows of zeros that weigh what zeros weighed until now."""
        axis, rank = self._axis, factor.shape[self._axis]
        so_far = self.values.get(name)
        if so_far is None:
            so_far = self.values[name] = torch.zeros_like(wide(factor))
            self._weights[name] = [(rank, 0.0)]
        if so_far.shape[1 - axis] != factor.shape[1 - axis]:
            raise StrategyError(
                f"{name}: client {update.client_id} sent a factor of shape {list(factor.shape)}, others sent "
                f"{list(so_far.shape)}; every client must train the same modules of the same base model"
            )
        missing = rank - so_far.shape[axis]
        if missing > 0:
            shape = (missing, so_far.shape[1]) if axis == 0 else (so_far.shape[0], missing)
            so_far = self.values[name] = torch.cat([so_far, so_far.new_zeros(shape)], dim=axis)
            self._weights[name].append((rank, self._weights[name][-1][1] if self._zero_pad else 0.0))
        return so_far


class _Steps:
    """Running means' steps `x + share (y - x)`, gathered by their share and taken in one call for each.

    In this form one tensor is its own mean, and equal tensors are, to the last bit.
    """

    def __init__(self) -> None:
        self._towards: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        self._fading: dict[float, list[Tensor]] = {}

    def towards(self, so_far: Tensor, tensor: Tensor, share: float) -> None:
        means, tensors = self._towards.setdefault(share, ([], []))
        means.append(so_far)
        tensors.append(tensor.to(so_far))

    def fade(self, so_far: Tensor, share: float) -> None:
        """A step towards zero."""
        self._fading.setdefault(share, []).append(so_far)

    def take(self) -> None:
        for share, (means, tensors) in self._towards.items():
            torch._foreach_lerp_(means, tensors, share)
        for share, means in self._fading.items():
            torch._foreach_mul_(means, 1.0 - share)


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
        dense.add(update.adapter.dense, update)
    parts: dict[str, Parts] = {}
    for name, entries in kept.items():
        entries.sort(key=lambda entry: entry[0])
        examples = sum(n for _, n, _ in entries)
        parts[name] = Parts([factors for _, _, factors in entries], [n / examples for _, n, _ in entries])
    return parts, dense.values


@dataclass(frozen=True)
class Batch:
    """The stacks of n modules of one shape, from the same clients with the same ranks, in fp64.

    Args:
        names: of the modules.
        A: [n, R, d_in], R = sum of the ranks; row j of client k is scaled by p_k s_k.
        B: [n, d_out, R]; B @ A is the ideal.
        rows: [R], each row's place in its client's A.
        shares: [R], p_k of the row's client.
        dtype: of results: fp32, or fp64 where the factors are.
    """

    names: Sequence[str]
    A: Tensor
    B: Tensor
    rows: Tensor
    shares: Tensor
    dtype: torch.dtype


def alike(parts: Mapping[str, Parts]) -> Iterator[Batch]:
    """Modules that can be computed together, so that a loop over a model's modules costs nothing."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, part in parts.items():
        key = (tuple((f.B.shape[0], *f.A.shape) for f in part.factors), tuple(part.shares))
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        first = parts[group[0]]
        ranks = [f.rank for f in first.factors]
        rows = torch.cat([torch.arange(rank) for rank in ranks])
        shares = torch.tensor(first.shares, dtype=torch.float64).repeat_interleave(torch.tensor(ranks))
        for names in at_once(group, sum(f.A.numel() + f.B.numel() for f in first.factors)):
            A = torch.stack([_weighted_rows(parts[name]) for name in names])
            B = torch.stack([torch.cat([f.B.double() for f in parts[name].factors], dim=1) for name in names])
            yield Batch(names, A, B, rows.to(A.device), shares.to(A.device), wide(first.factors[0].A).dtype)


def _weighted_rows(parts: Parts) -> Tensor:
    return torch.cat([(p * f.scaling) * f.A.double() for p, f in zip(parts.shares, parts.factors, strict=True)])
