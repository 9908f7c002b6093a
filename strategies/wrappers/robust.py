"""Robust aggregation: poisoned replies are shrunk, outvoted or dropped before the inner strategy sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, map_tensors, to_fp32
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate

from ..base import ServerState
from ..initializers.registry import asks_clients
from ..tools.replies import arrivals
from .distances import Move, squared_distances, started_from
from .wrapper import Wrapper, innermost

if TYPE_CHECKING:
    from ..initializers.base import Initializer


@dataclass(frozen=True)
class Robust(Wrapper):
    """Filters a round's replies. Clients count alike in every rule; the inner strategy weighs what is left by n_k.

    - "norm-bound": a client that moved farther than `bound` times the median of the clients is drawn back to that
      distance, along the line of its factors from where they started, and its examples count up to `bound` times
      their median: what pulls is both. The distance is the Frobenius norm of the change
      of the effective updates, `|s B_k A_k - s B A|`, over all modules and tensors. Sun et al. 2019, "Can You
      Really Backdoor Federated Learning?", https://arxiv.org/abs/1911.07963, with a bound relative to the others.
    - "median", "trimmed-mean": of the clients' factors, entry by entry at the server's scaling, as one reply; the mean
      is over what is left without the largest and the smallest `trim` of the values, rounded up. Yin et al. 2018,
      "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", https://arxiv.org/abs/1803.01498,
      Algorithm 1. Ranks within a module must be equal. Entries depend on the factors' basis: (B M, M^-1 A) is the
      same update, and another median.
    - "krum", "multi-krum": a client's score is the sum of its squared distances `|dW_i - dW_j|^2` to the nearest
      K - f - 2 others; the best one is kept, or the best m, whose mean the inner strategy makes. Blanchard et al.
      2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", https://arxiv.org/abs/1703.02757.
      Distances are between effective updates, through Gram matrices in fp64, so unequal ranks and refactored
      copies compare as what they do; it needs K >= 2 f + 3.

    Memory: the factors of all replies. Cost: O(d (sum r_k)^2) for the distances, O(K d r^2) for the norms.

    Args:
        inner: a strategy without personal factors.
        rule: see above.
        bound: of "norm-bound", at least 1; 2 leaves honest clients alone, which differ in their data.
        trim: of "trimmed-mean", in [0, 0.5): the share of poisoned clients that it withstands.
        byzantine: f of the krum rules, the number of poisoned clients that they withstand.
        keep: m of "multi-krum"; 0: K - f, as in the paper's experiments.
    """

    rule: Literal["norm-bound", "median", "trimmed-mean", "krum", "multi-krum"] = "norm-bound"
    bound: float = 2.0
    trim: float = 0.2
    byzantine: int = 1
    keep: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(innermost(self.inner)).__name__
        if self.inner.personal:
            raise StrategyError(
                f"strategy.robust = {self.rule} compares whole updates, and {name} leaves "
                f"{' and '.join(sorted(self.inner.personal))} on the clients; set strategy.robust = none"
            )
        if self._by_entry and asks_clients(self.inner):
            raise self._no_entries(name)
        if self.rule != "norm-bound" and not self.inner.one_start:
            raise StrategyError(
                f"strategy.robust = {self.rule} compares what clients end with, and with these strategy.options {name} "
                "has them start from different factors; set strategy.robust = norm-bound, or other strategy.options"
            )
        for option, value, good, expected in (
            ("bound", self.bound, 1 <= self.bound < float("inf"), "a number of at least 1"),
            ("trim", self.trim, 0 <= self.trim < 0.5, "0 or more, below 0.5"),
            ("byzantine", self.byzantine, self.byzantine >= 0, "0 or more"),
            ("keep", self.keep, self.keep >= 0, "0 (K - f) or more"),
        ):
            if not good:
                raise StrategyError(f"strategy.robust-{option} = {value}, expected {expected}")

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def unequal_ranks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.unequal_ranks and not self._by_entry

    @property
    def any_statistic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.any_statistic and not self._by_entry

    @property
    def _by_entry(self) -> bool:
        return self.rule in ("median", "trimmed-mean")

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Raises StrategyError if the inner strategy or the rule cannot serve these clients, or so few."""
        super().check(clients)
        unequal = len({client.all_ranks for client in clients}) > 1
        if self._by_entry and unequal:
            raise self._unequal("the clients", [client.rank for client in clients])
        if self.inner.own_rows and unequal and self.rule in ("krum", "multi-krum"):
            raise StrategyError(
                f"strategy.robust = {self.rule} compares whole updates, and with unequal ranks "
                f"{type(innermost(self.inner)).__name__} has each client train other rows or heads; set "
                "strategy.robust = norm-bound, or one rank by lora.ranks = ''"
            )
        self._enough(len(clients), "the run")

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """What the inner strategy makes of the replies that the rule lets through.

        Raises:
            StrategyError: too few replies for the rule, or unequal ranks under a rule of entries.
        """
        held = self._arrived(updates, number)
        if self.rule == "norm-bound":
            held = self._bounded(held)
        elif self._by_entry:
            held = [self._middle(held, state)]
        else:
            held = self._nearest(held, state)
        return self.inner.aggregate(state, held, number)

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """What the inner strategy begins with, from the statistics that the rule lets through.

        Raises:
            StrategyError: too few replies for the rule, or a rule of entries: each client's statistics have a basis of
                their own.
        """
        if not initializer.statistic:
            return self.inner.begin(state, replies, initializer)
        if self._by_entry:
            raise self._no_entries(type(initializer).__name__)
        held = self._arrived(replies, 0)
        held = self._bounded(held) if self.rule == "norm-bound" else self._nearest(held, state)
        return self.inner.begin(state, held, initializer)

    def _arrived(self, updates: Iterable[ClientUpdate], number: int) -> list[ClientUpdate]:
        """The replies in the order of client ids, enough of them for the rule."""
        held = sorted(arrivals(updates, number), key=lambda update: update.client_id)
        self._enough(len(held), f"round {number}")
        return held

    def _bounded(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Each reply, or where it would have been on its way at the largest distance allowed."""
        moves = [Move.of(update) for update in updates]
        limit = self.bound * median_low(move.norm(1.0) for move in moves)
        most = int(self.bound * median_low(update.num_examples for update in updates))
        updates = [replace(update, num_examples=min(update.num_examples, most)) for update in updates]
        return [
            update if move.norm(1.0) <= limit else _drawn_back(update, move.share(limit))
            for update, move in zip(updates, moves, strict=True)
        ]

    def _middle(self, updates: Sequence[ClientUpdate], state: ServerState) -> ClientUpdate:
        """The median or trimmed mean of all replies, as the reply of one client that stands for them."""
        lora: dict[str, LoraFactors] = {}
        for name in dict.fromkeys(name for update in updates for name in update.adapter.lora):
            parts = [update.adapter.lora[name] for update in updates if name in update.adapter.lora]
            ranks = [part.A.shape[0] or part.B.shape[-1] for part in parts]
            if len(set(ranks)) > 1:
                raise self._unequal(name, ranks)
            s = state.adapter.lora[name].scaling if name in state.adapter.lora else parts[0].scaling
            A = self._middle_of([(part.scaling / s) * to_fp32(part.A) for part in parts], name)
            B = self._middle_of([to_fp32(part.B) for part in parts], name)
            cores = [to_fp32(part.R) for part in parts if part.R is not None]
            lora[name] = LoraFactors(A=A, B=B, scaling=s, R=self._middle_of(cores, name) if cores else None)
        dense: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for update in updates for name in update.adapter.tensors):
            tensors = [to_fp32(update.adapter.tensors[name]) for update in updates if name in update.adapter.tensors]
            dense[name] = self._middle_of(tensors, name)
        examples = sum(update.num_examples for update in updates)
        return replace(updates[0], adapter=AdapterState(lora=lora, tensors=dense), num_examples=examples, metrics={})

    def _middle_of(self, tensors: Sequence[Tensor], where: str) -> Tensor:
        """Entry by entry, the mean of the values in the middle."""
        count = len(tensors)
        self._enough(count, where)
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise StrategyError(
                f"{where}: clients sent shapes {shapes}, and strategy.robust = {self.rule} compares entries; "
                "every client must train the same modules of the same base model"
            )
        dropped = (count - 1) // 2 if self.rule == "median" else _trimmed(self.trim, count)
        return torch.stack(list(tensors)).sort(dim=0).values[dropped : count - dropped].mean(dim=0)

    def _nearest(self, updates: Sequence[ClientUpdate], state: ServerState) -> list[ClientUpdate]:
        """The replies with the lowest scores, in order; of equal ones, those of the lower ids."""
        distances = squared_distances(updates, state)
        count = len(distances)
        others = distances.masked_fill(torch.eye(count, dtype=torch.bool), float("inf"))
        scores = others.sort(dim=1).values[:, : count - self.byzantine - 2].sum(dim=1).tolist()
        wanted = 1 if self.rule == "krum" else self.keep or count - self.byzantine
        return [updates[i] for i in sorted(sorted(range(count), key=scores.__getitem__)[:wanted])]

    def _enough(self, count: int, where: str) -> None:
        if self.rule == "trimmed-mean" and 2 * _trimmed(self.trim, count) >= count:
            raise StrategyError(
                f"{where}: strategy.robust = trimmed-mean with strategy.robust-trim = {self.trim} drops "
                f"{2 * _trimmed(self.trim, count)} values of {count} clients; sample more clients, or trim less"
            )
        if self.rule in ("krum", "multi-krum"):
            least = max(2 * self.byzantine + 3, self.keep + self.byzantine if self.rule == "multi-krum" else 0)
            if count < least:
                raise StrategyError(
                    f"{where}: strategy.robust = {self.rule} with strategy.robust-byzantine = {self.byzantine}"
                    f"{f' and strategy.robust-keep = {self.keep}' if self.keep else ''} needs {least} clients, "
                    f"got {count}; sample more clients, or lower these"
                )

    def _no_entries(self, name: str) -> StrategyError:
        return StrategyError(
            f"strategy.robust = {self.rule} compares entries, and {name}'s statistics have a basis for each client; "
            "set strategy.robust = norm-bound, krum or multi-krum"
        )

    def _unequal(self, where: str, ranks: Sequence[int]) -> StrategyError:
        return StrategyError(
            f"{where}: strategy.robust = {self.rule} compares factors entry by entry and needs one rank, got ranks "
            f"{', '.join(map(str, ranks[:10]))}; set strategy.robust = norm-bound, krum or multi-krum"
        )


def _drawn_back(update: ClientUpdate, share: float) -> ClientUpdate:
    """The reply with what it sent at `start + share (end - start)`."""

    def point(name: str, end: Tensor, begin: Tensor) -> Tensor:
        return torch.lerp(to_fp32(begin), to_fp32(end), share)

    return replace(update, adapter=map_tensors(point, update.adapter, started_from(update)))


def _trimmed(trim: float, count: int) -> int:
    """How many values are dropped at either end; rounded up, so that a few clients are protected as well."""
    return math.ceil(trim * count - 1e-9)
