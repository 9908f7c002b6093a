"""A round's replies, read one by one, or collected by module; or their sum, where they were sketches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, Sum, in_chunks, to_fp32
from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate


@dataclass(frozen=True)
class ModuleReplies:
    """One module's factors from all clients that sent it, in the order of client ids.

    Args:
        factors: the factors of each client; of a sum, those of the ideal alone.
        shares: the weight of each client, p_k = n_k / sum(n), where n_k is its number of examples.
        summed: of a sum, what its factors do not tell.
    """

    factors: list[LoraFactors]
    shares: list[float]
    summed: SummedModule | None = None

    @property
    def ideal(self) -> Sum:
        """`sum_k p_k s_k B_k A_k`."""
        return Sum(self.factors, self.shares)

    @property
    def of_ranks(self) -> Mapping[int, float]:
        """Rank -> the share of the clients of this rank."""
        if self.summed is not None:
            return self.summed.of_ranks
        found: dict[int, float] = {}
        for factors, share in zip(self.factors, self.shares, strict=True):
            found[factors.rank] = found.get(factors.rank, 0.0) + share
        return found


@dataclass(frozen=True)
class SummedModule:
    """What is known of one module's replies besides the ideal, where only their sum is known.

    Args:
        of_ranks: rank -> the share of the clients of this rank.
        mean: the means of s_k A_k and of B_k, filled up with zeros to the largest of these ranks, at scaling 1; None if
            the strategy does not need them.
    """

    of_ranks: Mapping[int, float]
    mean: LoraFactors | None = None


@dataclass(frozen=True)
class SummedUpdate(ClientUpdate):
    """All replies of a round, added up: its factors are the ideal, its tensors their means.

    It is made on the server (see `server.sums`), and stands for the replies of a strategy with `of_ideal`.

    Args:
        modules: what is known of each module besides.
    """

    modules: Mapping[str, SummedModule] = field(default_factory=dict)

    def parts(self) -> dict[str, ModuleReplies]:
        """The sum as the replies of one module each."""
        return {name: ModuleReplies([f], [1.0], self.modules[name]) for name, f in self.adapter.lora.items()}


def arrivals(updates: Iterable[ClientUpdate], number: int) -> Iterator[ClientUpdate]:
    """The replies one by one, in the order of their arrival, each of them checked.

    Raises:
        StrategyError: there is no reply, a reply has no examples, or a client replied twice.
    """
    seen: set[int] = set()
    for update in updates:
        if update.client_id in seen:
            raise StrategyError(
                f"round {number}: client {update.client_id} replied twice; expected one reply per client"
            )
        seen.add(update.client_id)
        if not update.num_examples > 0:
            raise StrategyError(
                f"round {number}: client {update.client_id} sent num_examples = {update.num_examples}, expected > 0"
            )
        yield update
    if not seen:
        raise StrategyError(f"round {number}: no client's reply arrived, so there is nothing to aggregate")


def gather(updates: Iterable[ClientUpdate], number: int) -> tuple[dict[str, ModuleReplies], dict[str, Tensor]]:
    """All replies' factors by module, and the means of the tensors trained in full.

    This is for methods that need all factors at the same time, so that all of them are in memory. They are sorted by
    client id, so that the order of arrival has no influence on the last bits of a result. Of a sum, the factors are
    those of the ideal.
    """
    kept: dict[str, list[tuple[int, int, LoraFactors]]] = {}
    dense = Means()
    for update in arrivals(updates, number):
        if isinstance(update, SummedUpdate):
            return update.parts(), dict(update.adapter.tensors)
        for name, factors in update.adapter.lora.items():
            kept.setdefault(name, []).append((update.client_id, update.num_examples, factors))
        dense.add(update.adapter.tensors, update.num_examples, update.client_id)
    parts: dict[str, ModuleReplies] = {}
    for name, entries in kept.items():
        entries.sort(key=lambda entry: entry[0])
        examples = sum(n for _, n, _ in entries)
        parts[name] = ModuleReplies([factors for _, _, factors in entries], [n / examples for _, n, _ in entries])
    return parts, dense.values


@dataclass(frozen=True)
class EqualShapes:
    """The stacked factors of n modules of one shape, from the same clients with the same ranks, in fp64.

    Args:
        names: names of the n modules.
        A: the clients' A one below the other, [n, R, d_in], where R is the sum of the ranks. The rows of client k are
            multiplied by p_k s_k.
        B: the clients' B side by side, [n, d_out, R]; B @ A is the ideal.
        mean_a: the means of s_k A_k, filled up with zeros to the largest rank r, [n, r, d_in].
        mean_b: those of B_k, [n, d_out, r].
        dtype: number format for results: fp64 if the clients' factors are fp64, else fp32.
    """

    names: Sequence[str]
    A: Tensor
    B: Tensor
    mean_a: Tensor
    mean_b: Tensor
    dtype: torch.dtype


def equal_shapes(parts: Mapping[str, ModuleReplies]) -> Iterator[EqualShapes]:
    """The modules in groups of equal shapes, so that a few batched operations replace a loop over all modules."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, part in parts.items():
        key = (tuple((f.B.shape[0], *f.A.shape) for f in part.factors), tuple(part.shares), max(part.of_ranks))
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        first = parts[group[0]]
        for names in in_chunks(group, sum(f.A.numel() + f.B.numel() for f in first.factors)):
            A = torch.stack([_weighted_rows(parts[name]) for name in names])
            B = torch.stack([torch.cat([f.B.double() for f in parts[name].factors], dim=1) for name in names])
            given = [summed.mean for name in names if (summed := parts[name].summed) and summed.mean]
            if len(given) == len(names):
                means = torch.stack([f.A.double() for f in given]), torch.stack([f.B.double() for f in given])
            else:
                means = _means(A, B, first)
            yield EqualShapes(names, A, B, *means, dtype=to_fp32(first.factors[0].A).dtype)


def _means(A: Tensor, B: Tensor, replies: ModuleReplies) -> tuple[Tensor, Tensor]:
    """The means of s_k A_k [n, r, d_in] and of B_k [n, d_out, r], from the stacked factors.

    Args:
        A: stacked, [n, R, d_in], where p_k s_k is in the rows of client k.
        B: stacked, [n, d_out, R].
        replies: of any of the n modules, for ranks and weights.
    """
    ranks = [f.rank for f in replies.factors]
    rows = torch.cat([torch.arange(rank) for rank in ranks]).to(A.device)
    shares = torch.tensor(replies.shares, dtype=torch.float64).repeat_interleave(torch.tensor(ranks)).to(A.device)
    mean_a = A.new_zeros(len(A), max(ranks), A.shape[2]).index_add_(1, rows, A)
    mean_b = B.new_zeros(len(B), B.shape[1], max(ranks)).index_add_(2, rows, B * shares)
    return mean_a, mean_b


def _weighted_rows(parts: ModuleReplies) -> Tensor:
    return torch.cat([(p * f.scaling) * f.A.double() for p, f in zip(parts.shares, parts.factors, strict=True)])
