"""Folds: updates that a strategy adds to the base model for good, kept as frozen factors (the anchor).

Quantized weights are never changed, since quantizing them again would lose nearly all of a small update. A fold is
one aggregate, and version v of the base is the base with the first v folds. A client that skipped rounds gets the
folds that it lacks. One that is too far behind gets all folds, compacted into one. Clients always concatenate what the
server sends, in the order of versions, so that all of them have the same factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .algebra import compress, concatenate
from .state import AdapterState


@dataclass(frozen=True)
class Folds:
    """The folds of a run.

    Args:
        parts: the folds; parts[0] leads from the unchanged base model to version `first`, and each later one to the
            next version.
        first: the version after parts[0].
        max_rank: the largest sum of a module's ranks; 0 means min(d_out, d_in), with which compacting loses nothing but
            fp32's rounding. A run sets it to `anchor.max-rank`.
        compact: False: folds are never compacted, for clients that merge folds into the weights of an fp32 base
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
        """The folds with one more.

        If the sum of a module's ranks exceeds the limit, that module is compressed to the limit, and all folds become
        one (they are compacted).
        """
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
        """The folds that a client of this version lacks, as (the version that they continue, folds).

        If the former is 0, the client has to drop its folds, and these are all.
        """
        if known_version == self.version:
            return known_version, ()
        if self.first <= known_version < self.version:
            return known_version, self.parts[known_version - self.first + 1 :]
        return 0, self.parts

    def total(self) -> AdapterState:
        """The sum of all folds, as one adapter of scaling 1."""
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
