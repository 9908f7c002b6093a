"""What strategies read from a round's replies: means that run as replies arrive, or all factors by module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, at_once, wide
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate


class Means:
    """Weighted means of tensors by name, each over the clients that sent it; memory for one tensor per name.

    They run as `mean + share (tensor - mean)`: one tensor is its own mean, and equal tensors are, to the last bit.

    Attributes:
        values: the means.
        weights: the sum of examples behind each.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        # What every reply so far had, by name and shape; empty where they differed.
        self._shapes: list[tuple[str, torch.Size]] = []

    def add(self, tensors: Mapping[str, Tensor], update: ClientUpdate) -> None:
        """Counts these tensors of an update, weighted by the client's examples.

        All tensors move in one call, so that it takes little more than reading them.

        Raises:
            StrategyError: a shape differs from the earlier ones'; nothing is ever broadcast.
        """
        steps: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        if self._shapes and [(name, t.shape) for name, t in tensors.items()] == self._shapes:  # as most replies are
            steps[self._share([*tensors], update)] = [*self.values.values()], [*tensors.values()]
        else:
            self._shapes = []
            for name, tensor in tensors.items():
                so_far = self.values.get(name)
                if so_far is None:
                    self.values[name], self.weights[name] = wide(tensor).clone(), update.num_examples
                    continue
                if so_far.shape != tensor.shape:
                    raise StrategyError(
                        f"{name}: client {update.client_id} sent shape {list(tensor.shape)}, others sent "
                        f"{list(so_far.shape)}; every client must train the same modules of the same base model"
                    )
                means, arrived = steps.setdefault(self._share([name], update), ([], []))
                means.append(so_far)
                arrived.append(tensor)
            if len(set(self.weights.values())) == 1:
                self._shapes = [(name, t.shape) for name, t in self.values.items()]
        for share, (means, arrived) in steps.items():
            same = all(t.dtype == m.dtype and t.device == m.device for t, m in zip(arrived, means, strict=True))
            torch._foreach_lerp_(
                means, arrived if same else [t.to(m) for t, m in zip(arrived, means, strict=True)], share
            )

    def _share(self, names: Sequence[str], update: ClientUpdate) -> float:
        """This update's part in these means, which have one weight, itself included."""
        weight = self.weights[names[0]] + update.num_examples
        self.weights |= dict.fromkeys(names, weight)
        return update.num_examples / weight


class RankMeans:
    """Weighted means of factors of unequal ranks, row by row: memory for one tensor per name and rank.

    Args:
        axis: that of the rank: 0 for A [r, d_in], 1 for B [d_out, r].
        zero_pad: True fills smaller ranks up with zeros, so that every client counts in every row; False takes
            each row's mean over the clients that have it.
    """

    def __init__(self, axis: int, zero_pad: bool) -> None:
        self._axis, self._zero_pad = axis, zero_pad
        # Clients of one rank are averaged by themselves: whole tensors, which is faster than parts of a larger one.
        self._of_rank: dict[int, Means] = {}

    def add(self, factors: Mapping[str, Tensor], update: ClientUpdate) -> None:
        """Counts one factor of each module, weighted by the client's examples.

        Raises:
            StrategyError: the other dimension differs from the earlier ones'.
        """
        by_rank: dict[int, dict[str, Tensor]] = {}
        for name, factor in factors.items():
            by_rank.setdefault(factor.shape[self._axis], {})[name] = factor
        for rank, alike in by_rank.items():
            self._of_rank.setdefault(rank, Means()).add(alike, update)

    def values(self) -> dict[str, Tensor]:
        """The means, at the largest rank that came.

        Raises:
            StrategyError: clients of different ranks sent factors of different lengths.
        """
        groups: dict[str, list[tuple[int, Tensor, float]]] = {}
        for rank in sorted(self._of_rank, reverse=True):
            for name, mean in self._of_rank[rank].values.items():
                groups.setdefault(name, []).append((rank, mean, self._of_rank[rank].weights[name]))
        found: dict[str, Tensor] = {}
        steps: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for name, group in groups.items():
            first = found[name] = group[0][1]
            if len(group) > 1:
                found[name] = torch.zeros_like(first)
                self._combine(name, group, found[name], steps)
        for share, (totals, means) in steps.items():
            torch._foreach_add_(totals, means, alpha=share)
        return found

    def _combine(
        self,
        name: str,
        group: list[tuple[int, Tensor, float]],
        total: Tensor,
        steps: dict[float, tuple[list[Tensor], list[Tensor]]],
    ) -> None:
        """Adds to the steps what makes `total` the mean of these ranks' means: (rank, mean, weight), falling ranks."""
        axis, every = self._axis, sum(weight for _, _, weight in group)
        for _, mean, _ in group:
            if mean.shape[1 - axis] != total.shape[1 - axis]:
                raise StrategyError(
                    f"{name}: clients sent factors of shapes {list(total.shape)} and {list(mean.shape)}; every client "
                    "must train the same modules of the same base model"
                )
        # rows from one rank to the next larger one are those of the clients with the larger ranks
        ends = [0, *(rank for rank, _, _ in reversed(group))] if not self._zero_pad else [0, group[0][0]]
        for begin, end in itertools.pairwise(ends):
            having = every if self._zero_pad else sum(weight for rank, _, weight in group if rank >= end)
            for rank, mean, weight in group:
                count = min(rank, end) - begin
                if count > 0:
                    totals, means = steps.setdefault(weight / having, ([], []))
                    totals.append(total.narrow(axis, begin, count))
                    means.append(mean.narrow(axis, begin, count))


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
