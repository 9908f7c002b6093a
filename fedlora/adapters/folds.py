"""Folds: what a strategy adds to the base model for good, kept as frozen factors (the anchor).

Quantized weights are never touched: re-quantizing a small update loses nearly all of it. A fold is one
aggregate; version v of the base is the base with the first v folds. A client that skipped rounds gets the
folds it lacks; one that is too far behind gets everything, compacted. Both end up with bit-equal weights,
since a client only ever concatenates what the server sends, in the order of versions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .algebra import compress, concatenate
from .state import AdapterState


@dataclass(frozen=True)
class Folds:
    """All folds of a run so far, and how large they may grow.

    Args:
        parts: parts[0] leads from the untouched base to version `first`, each later one a version further.
        first: the version that parts[0] leads to.
        max_rank: the largest sum of ranks of a module; 0 means min(d_out, d_in), where compacting loses no more than
            fp32 rounds. A run sets it to `anchor.max-rank`.
        compact: False keeps every fold as it came, for clients that merge folds into the weights of an fp32 base
            (`anchor.base-update = merge`).
    """

    parts: tuple[AdapterState, ...] = ()
    first: int = 1
    max_rank: int = 0
    compact: bool = True

    @property
    def version(self) -> int:
        return self.first + len(self.parts) - 1 if self.parts else 0

    def push(self, fold: AdapterState) -> Folds:
        """The folds with one more; as one fold when some module's sum of ranks exceeds its limit, and is compacted."""
        grown = replace(self, parts=(*self.parts, fold))
        full = _full(grown.parts, self.max_rank) if self.compact else set()
        if not full:
            return grown
        lora = dict(grown.total().lora)
        lora |= compress({name: lora[name] for name in full}, self.max_rank)
        return replace(self, parts=(AdapterState(lora=lora),), first=grown.version)

    def emptied(self) -> Folds:
        """No folds, under the same limits."""
        return replace(self, parts=(), first=1)

    def replaced(self, fold: AdapterState) -> Folds:
        """This fold in place of all before it, as the next version."""
        return replace(self, parts=(fold,), first=self.version + 1)

    def since(self, known_version: int) -> tuple[int, tuple[AdapterState, ...]]:
        """`(from_version, folds)`: what brings a client of this version up to date; from 0 means all anew."""
        if known_version == self.version:
            return known_version, ()
        if self.first <= known_version < self.version:
            return known_version, self.parts[known_version - self.first + 1 :]
        return 0, self.parts

    def total(self) -> AdapterState:
        """All folds as one adapter of scaling 1."""
        return concatenate(self.parts)


def _full(parts: tuple[AdapterState, ...], max_rank: int) -> set[str]:
    """The modules whose sum of ranks exceeds its limit."""
    ranks: dict[str, int] = {}
    limits: dict[str, int] = {}
    for part in parts:
        for name, factors in part.lora.items():
            ranks[name] = ranks.get(name, 0) + factors.rank
            most = min(factors.A.shape[1], factors.B.shape[0])
            limits[name] = min(max_rank or most, most)
    return {name for name, rank in ranks.items() if rank > limits[name]}
