"""All that crosses the wire: what a server sends a client, and what a client sends back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapters import AdapterState
from fedlora.config import alpha_of, matches


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client before it sends anything.

    Args:
        client_id: unique within the run.
        rank: the LoRA rank that the client's hardware affords.
        alpha: LoRA's alpha, a number, or a multiple of the rank such as "2r".
        num_examples: training examples held, the client's weight in every mean.
        known_base_version: the number of folds that the client holds already (0: none).
        rslora: scaling is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: regular expression matched against the end of a module's name -> its rank, for every
            client alike, as in PEFT; other modules have `rank`.
        class_names: what the classes of its rows are called, in the order of their numbers; nothing for numbers alone.
        ranks: module -> rank, as the server has spread what the client affords; see `lora.allocation`. It does not
            travel. Empty: `rank` and `rank_pattern` hold.
    """

    client_id: int
    rank: int
    alpha: float | str = "2r"
    num_examples: int = 1
    known_base_version: int = 0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of one module's factors on this client."""
        return self.ranks.get(module) or self._own_rank(module)

    def _own_rank(self, module: str) -> int:
        """The rank that the client affords for this module."""
        for pattern, rank in self.rank_pattern.items():
            if matches(pattern, module):
                return rank
        return self.rank

    def scaling_of(self, module: str) -> float:
        """The scaling of one module's factors on this client: by the rank that it affords, however that is spread."""
        rank = self._own_rank(module)
        return alpha_of(self.alpha, rank) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def all_ranks(self) -> tuple[object, ...]:
        """Equal for two clients whose ranks are equal in every module."""
        return self.rank, tuple(self.rank_pattern.items()), tuple(self.ranks.items())

    def with_ranks(self, change: Callable[[int], int]) -> ClientInfo:
        """The client with another rank in place of each of its own."""
        return replace(
            self,
            rank=change(self.rank),
            rank_pattern={pattern: change(rank) for pattern, rank in self.rank_pattern.items()},
            ranks={module: change(rank) for module, rank in self.ranks.items()},
        )


@dataclass(frozen=True)
class Term:
    """A term that a client adds to its loss.

    Args:
        name: one of the table in `clients/training/terms.py`.
        weight: the factor of the term, at least 0.
        value: the one number that the term needs besides; 0 where it needs none.
    """

    name: str
    weight: float
    value: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a client trains in a round, what it sends back, and what it keeps to itself.

    Args:
        train: the factors that are trained, of "A", "B" and "R".
        send: the factors that are sent back.
        keep: the factors that a client keeps from round to round: it starts from its own, where it has any, and from
            the adapter's otherwise.
        modules: the modules whose factors are trained and sent back; None means all of them. The others stay as they
            were sent. Tensors that are trained in full are trained and sent back in every plan that trains anything.
        terms: what is added to the loss.
    """

    train: frozenset[str] = frozenset({"A", "B"})
    send: frozenset[str] = frozenset({"A", "B"})
    keep: frozenset[str] = frozenset()
    modules: frozenset[str] | None = None
    terms: tuple[Term, ...] = ()

    def sent_back(self, adapter: AdapterState) -> AdapterState:
        """The factors of the modules that are sent back, and all tensors."""
        if self.modules is None:
            return adapter
        lora = {name: factors for name, factors in adapter.lora.items() if name in self.modules}
        return AdapterState(lora=lora, tensors=adapter.tensors)


@dataclass(frozen=True)
class Broadcast:
    """What one client needs for one round: its start, and what to add to the base model first.

    Args:
        round: 1 for the first.
        adapter: the adapter from which this client starts training, at its own ranks and scalings.
        base_version: the number of folds in the base once `folds` are added.
        folds: frozen updates, to be added in this order to what the client holds of version `folds_from`.
        folds_from: the version that `folds` continue; 0 means: drop what you hold and start with these.
        plan: what is trained, sent back and kept.
        steady: row j of A and column j of B mean what they meant in the round before, so that what a coarse number
            format left out of the last reply may be added to the next.
        job: "train"; or, in round 0, the name of a statistic that the client is to measure at this adapter.
        run: the key of the run, below which a client keeps what is its own; a run that is resumed has the same.
            Empty: Flower's run id.
    """

    round: int
    adapter: AdapterState
    base_version: int = 0
    folds: tuple[AdapterState, ...] = ()
    folds_from: int = 0
    plan: Plan = field(default_factory=Plan)
    steady: bool = False
    job: str = "train"
    run: str = ""


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back.

    Args:
        client_id: as in its `ClientInfo`.
        adapter: the factors after training (not differences). A factor that was not uploaded is empty.
        num_examples: the weight in every mean, > 0.
        base_version: the base that it was trained on.
        metrics: numbers only, such as train-loss, tokens, seconds.
        start: the adapter that this client started from, as it was sent. The server adds it when it reads the reply; it
            does not travel.
    """

    client_id: int
    adapter: AdapterState
    num_examples: int
    base_version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: AdapterState | None = None
