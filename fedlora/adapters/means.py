"""Weighted means that run as replies arrive, also over unequal ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.common.errors import StrategyError

from .state import to_fp32


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

    def add(self, tensors: Mapping[str, Tensor], weight: float, client_id: int) -> None:
        """Counts these tensors of a client's reply, with this weight.

        All tensors move in one call, so that it takes little more than reading them.

        Raises:
            StrategyError: a shape differs from the earlier ones'; nothing is ever broadcast.
        """
        steps: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        if self._shapes and [(name, t.shape) for name, t in tensors.items()] == self._shapes:  # as most replies are
            steps[self._share([*tensors], weight)] = [*self.values.values()], [*tensors.values()]
        else:
            self._shapes = []
            for name, tensor in tensors.items():
                so_far = self.values.get(name)
                if so_far is None:
                    self.values[name], self.weights[name] = to_fp32(tensor).clone(), weight
                    continue
                if so_far.shape != tensor.shape:
                    raise StrategyError(
                        f"{name}: client {client_id} sent shape {list(tensor.shape)}, others sent "
                        f"{list(so_far.shape)}; every client must train the same modules of the same base model"
                    )
                means, arrived = steps.setdefault(self._share([name], weight), ([], []))
                means.append(so_far)
                arrived.append(tensor)
            if len(set(self.weights.values())) == 1:
                self._shapes = [(name, t.shape) for name, t in self.values.items()]
        for share, (means, arrived) in steps.items():
            same = all(t.dtype == m.dtype and t.device == m.device for t, m in zip(arrived, means, strict=True))
            torch._foreach_lerp_(
                means, arrived if same else [t.to(m) for t, m in zip(arrived, means, strict=True)], share
            )

    def _share(self, names: Sequence[str], weight: float) -> float:
        """This reply's part in these means, which have one weight, itself included."""
        total = self.weights[names[0]] + weight
        self.weights |= dict.fromkeys(names, total)
        return weight / total


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

    def add(self, factors: Mapping[str, Tensor], weight: float, client_id: int) -> None:
        """Counts one factor of each module of a client's reply, with this weight.

        Raises:
            StrategyError: the other dimension differs from the earlier ones'.
        """
        by_rank: dict[int, dict[str, Tensor]] = {}
        for name, factor in factors.items():
            by_rank.setdefault(factor.shape[self._axis], {})[name] = factor
        for rank, of_rank in by_rank.items():
            self._of_rank.setdefault(rank, Means()).add(of_rank, weight, client_id)

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
