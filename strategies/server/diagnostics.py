"""What a round did, in numbers: error against the ideal, agreement of clients, spectrum and norms of the ideal.

Every matrix in question is a sum of rank-1 terms, see `round_terms.py`. With `H = (B'B) * (AA')`, entry by entry, inner
products of such sums are `c' H d`: one pair of Gram matrices per module answers everything, in fp64, O(d N^2).
Squaring leaves relative errors below 1e-7 to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters.lowrank import singular_values
from fedlora.exchange import Broadcast, ClientUpdate

from ..base import ServerState
from .round_terms import RoundTerms

# More terms than this in one module, and the round's numbers would cost more than its aggregation.
_MOST_TERMS = 1024


@dataclass(frozen=True)
class Diagnosis:
    """One round's numbers; None where they would cost too much, or cannot be known.

    Args:
        error: `|what the round added - ideal|_F / |ideal|_F` over all modules; the ideal is `sum_k p_k dW_k`.
        drift: `sqrt(sum_k p_k |c_k - c|^2 / sum_k p_k |c_k|^2)`, where c_k is how far client k moved its update and
            c = sum_k p_k c_k: 0 where all moved alike, near 1 where what they learned has nothing in common.
        update_cosine: the mean over pairs of clients of the cosine between c_j and c_k, each over all modules
            together: 1 where all moved the same way, however far, 0 where their ways have nothing in common, below
            0 where they undo each other. None with fewer than two clients, or where one did not move.
        tail_energy: the share of |ideal|_F^2 beyond the server's rank, which no truncation to it can keep.
        effective_rank: `exp(entropy of s / sum(s))` of the ideal's singular values s (Roy & Vetterli 2007, "The
            effective rank"), mean over modules.
        norms: module -> |ideal|_F.
    """

    error: float | None = None
    drift: float | None = None
    update_cosine: float | None = None
    tail_energy: float | None = None
    effective_rank: float | None = None
    norms: Mapping[str, float] | None = None


def diagnose(
    before: ServerState, after: ServerState, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast]
) -> Diagnosis:
    """The numbers of the round that led from `before` to `after`.

    Args:
        before: what the round's broadcasts came from.
        after: what the strategy made of the updates.
        updates: as the server read them.
        sent: client id -> its broadcast.
    """
    this = RoundTerms.of(before, after, updates, sent)
    modules = {name: found for name in after.adapter.lora if (found := this.module(name))}
    if not modules or any(terms.B.shape[1] > _MOST_TERMS for terms in modules.values()):
        return Diagnosis()
    squares = dict.fromkeys(("error", "ideal", "apart", "moved", "tail", "energy"), 0.0)
    ranks: list[float] = []
    norms: dict[str, float] = {}
    together = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    sizes = torch.zeros(len(updates), dtype=torch.float64)
    for name, terms in modules.items():
        b, a = terms.B.double(), terms.A.double()
        g_b, g_a = b.T @ b, a @ a.T
        inner = g_b * g_a
        off = terms.added - terms.ideal
        norms[name] = _form(inner, terms.ideal) ** 0.5
        squares["error"] += _form(inner, off)
        squares["ideal"] += norms[name] ** 2
        common = terms.shares @ terms.moves
        apart = terms.moves - common
        squares["apart"] += float((terms.shares * ((apart @ inner) * apart).sum(dim=1)).sum())
        across = terms.moves @ inner @ terms.moves.T
        squares["moved"] += float(terms.shares @ across.diagonal())
        together[terms.who[:, None], terms.who] += across
        sizes[terms.who] += (terms.moves.abs() @ inner.diagonal().sqrt()).square()
        own = slice(terms.clients)
        c = terms.ideal[own]
        s = singular_values(g_b[own, own], g_a[own, own] * c[:, None] * c)
        s = s[: min(b.shape[0], a.shape[1])]
        squares["tail"] += float(s[terms.rank :].square().sum())
        squares["energy"] += float(s.square().sum())
        if float(s.sum()) > 0:
            p = s / s.sum()
            ranks.append(float(torch.exp(torch.special.entr(p).sum())))
    return Diagnosis(
        error=_root_ratio(squares["error"], squares["ideal"]),
        drift=_root_ratio(squares["apart"], squares["moved"]),
        update_cosine=_mean_cosine(together, sizes),
        tail_energy=squares["tail"] / squares["energy"] if squares["energy"] else 0.0,
        effective_rank=sum(ranks) / len(ranks) if ranks else 0.0,
        norms=norms,
    )


def _form(inner: Tensor, coefficients: Tensor) -> float:
    return max(float(coefficients @ inner @ coefficients), 0.0)


def _root_ratio(part: float, whole: float) -> float:
    if whole <= 0:
        return 0.0 if part <= 0 else float("inf")
    return (max(part, 0.0) / whole) ** 0.5


def _mean_cosine(together: Tensor, sizes: Tensor) -> float | None:
    """The mean cosine over pairs.

    Args:
        together: [K, K], the moves' inner products.
        sizes: [K], the squared sum of the norms of each move's terms, of which 1e-14 is rounding.
    """
    squares = together.diagonal()
    if len(squares) < 2 or bool((squares <= 1e-14 * sizes).any()):
        return None
    cosines = together / squares.sqrt() / squares.sqrt()[:, None]
    return float(cosines[*torch.triu_indices(*cosines.shape, offset=1)].mean())
