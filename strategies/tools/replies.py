"""A round's replies, read one by one, or collected by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, in_chunks, to_fp32
from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate


@dataclass(frozen=True)
class ModuleReplies:
    """One module's factors from all clients that sent it, in the order of client ids.

    Args:
        factors: the factors of each client.
        shares: the weight of each client, p_k = n_k / sum(n), where n_k is its number of examples.
    """

    factors: list[LoraFactors]
    shares: list[float]


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
    client id, so that the order of arrival has no influence on the last bits of a result.
    """
    kept: dict[str, list[tuple[int, int, LoraFactors]]] = {}
    dense = Means()
    for update in arrivals(updates, number):
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
        rows: the number of each row in its client's own A, [R].
        shares: the weight p_k of each row's client, [R].
        dtype: number format for results: fp64 if the clients' factors are fp64, else fp32.
    """

    names: Sequence[str]
    A: Tensor
    B: Tensor
    rows: Tensor
    shares: Tensor
    dtype: torch.dtype


def equal_shapes(parts: Mapping[str, ModuleReplies]) -> Iterator[EqualShapes]:
    """The modules in groups of equal shapes, so that a few batched operations replace a loop over all modules."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, part in parts.items():
        key = (tuple((f.B.shape[0], *f.A.shape) for f in part.factors), tuple(part.shares))
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        first = parts[group[0]]
        ranks = [f.rank for f in first.factors]
        rows = torch.cat([torch.arange(rank) for rank in ranks])
        shares = torch.tensor(first.shares, dtype=torch.float64).repeat_interleave(torch.tensor(ranks))
        for names in in_chunks(group, sum(f.A.numel() + f.B.numel() for f in first.factors)):
            A = torch.stack([_weighted_rows(parts[name]) for name in names])
            B = torch.stack([torch.cat([f.B.double() for f in parts[name].factors], dim=1) for name in names])
            yield EqualShapes(names, A, B, rows.to(A.device), shares.to(A.device), to_fp32(first.factors[0].A).dtype)


def _weighted_rows(parts: ModuleReplies) -> Tensor:
    return torch.cat([(p * f.scaling) * f.A.double() for p, f in zip(parts.shares, parts.factors, strict=True)])
