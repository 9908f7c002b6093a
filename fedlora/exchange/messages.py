"""The messages between server and clients: a `Broadcast` to each client, and a `ClientUpdate` back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapters import AdapterState
from fedlora.adapters.sketched_sum import Sketch
from fedlora.config import alpha_of, matches

_FACTORS = frozenset("ABR")


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows about a client before it sends the first message of a round.

    Args:
        client_id: number of the client, unique within the run.
        rank: the LoRA rank that the client's hardware allows.
        alpha: LoRA's alpha: a number, or a multiple of the rank such as "2r".
        num_examples: number of the client's training examples, which is its weight in every mean.
        known_base_version: the number of folds that the client already has (0: none).
        rslora: True if the scaling is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: ranks of some modules, the same for all clients, as in PEFT: a regular expression for the end of
            the module's name -> its rank. Other modules have the rank `rank`.
        class_names: names of the classes in the client's rows, in the order of their numbers; empty if the rows have
            only numbers.
        ranks: module -> rank, as the server has spread what the client's hardware allows; see `lora.allocation`. They
            are not sent. Empty: `rank` and `rank_pattern` hold.
        edges: names of the edges through which the server reaches the client, that nearest to the server first.
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
    edges: tuple[str, ...] = ()

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

    @property
    def every_rank(self) -> frozenset[int]:
        """The ranks that occur in the client's modules, or may occur."""
        return frozenset({self.rank, *self.rank_pattern.values(), *self.ranks.values()})

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
    """What a client does beside its loss: a term that it adds, or a projection after each step.

    Args:
        name: one of the table in `clients/training/terms.py`, or a projection of `clients/training/projections.py`.
        weight: the factor of the term, at least 0.
        value: the one number that the term needs besides; 0 where it needs none.
    """

    name: str
    weight: float
    value: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Which factors a client trains in a round, which it sends back, and which it keeps.

    Args:
        train: the factors ("A", "B", "R") that are trained.
        send: the factors that are sent back.
        keep: the personal factors, which stay on the client from round to round. The client starts from its own
            personal factors, or from those in the broadcast if it has none yet. Besides "A", "B" and "R", these are
            parts of an adapter kind, by the ends of their tensors' names, such as "mtllora_L". They are never sent
            back.
        frozen: parts of an adapter kind, by the ends of their tensors' names, that are neither trained nor sent back.
        modules: the modules whose factors are trained and sent back; None: all modules. The factors of other modules
            are not changed. Tensors trained in full are trained and sent back unless `train` is empty.
        terms: the terms that are added to the loss, and projections of the factors.
        begun: number of the round in which the present adapter began, from 1.
        span: number of rounds from then until the adapter becomes a fold and a new one begins; 0: the run's end.
        sketch: how the client's update is sketched, so that the server needs only the sum of all replies; None: the
            factors are sent.
    """

    train: frozenset[str] = frozenset({"A", "B"})
    send: frozenset[str] = frozenset({"A", "B"})
    keep: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    modules: frozenset[str] | None = None
    terms: tuple[Term, ...] = ()
    begun: int = 1
    span: int = 0
    sketch: Sketch | None = None

    def sent_back(self, adapter: AdapterState) -> AdapterState:
        """The part of the adapter that is sent back: the factors of the plan's modules, and all shared tensors."""
        lora = {n: f for n, f in adapter.lora.items() if self.modules is None or n in self.modules}
        tensors = {n: t for n, t in self.unfrozen(adapter).tensors.items() if not self.keeps(n)}
        return AdapterState(lora=lora, tensors=tensors)

    def unfrozen(self, adapter: AdapterState) -> AdapterState:
        """The adapter without the parts that are frozen."""
        tensors = {n: t for n, t in adapter.tensors.items() if n.rpartition(".")[2] not in self.frozen}
        return AdapterState(lora=adapter.lora, tensors=tensors)

    def keeps(self, tensor: str) -> bool:
        """Whether the tensor of this name is a personal part of an adapter kind."""
        return tensor.rpartition(".")[2] in self.keep - _FACTORS

    @property
    def kept_factors(self) -> frozenset[str]:
        """The personal ones of "A", "B" and "R"."""
        return self.keep & _FACTORS


@dataclass(frozen=True)
class Masking:
    """How a client masks its reply, so that the server reads only the sum of all; see `fedlora.exchange.secure`.

    Args:
        session: names this try of the round; masks are of use in no other.
        weight: of this client in the sum, in (0, 1].
        clients: the largest number of clients in the sum.
        neighbours: the clients with which this one masks.
        ranks: module -> the rank to which factors are filled up with zeros; of the modules whose factors are sent.
    """

    session: str
    weight: float
    clients: int
    neighbours: tuple[int, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Broadcast:
    """The server's message to one client for one round.

    Args:
        round: number of the round, from 1; 0 asks for a statistic.
        adapter: the adapter from which this client starts training, at its own ranks and scalings.
        base_version: the number of all folds that the client has after it has added `folds`.
        folds: frozen updates that the client adds, in this order, to its folds up to version `folds_from`.
        folds_from: the version that `folds` continue. With 0, the client drops the folds that it has, and `folds` are
            all that there are.
        plan: which factors are trained, sent back and kept.
        steady: True if row j of A and column j of B mean the same as in the round before. The client may then add
            what a coarse number format left out of its last reply to its next one.
        job: "train", or in round 0 the name of the statistic that the client measures at this adapter.
        run: key of the run, under which a client stores its own state. It stays the same when the run is resumed.
            Empty: Flower's run id.
        sparse: True if most entries of the adapter are zero, so that it is sent in the format sparse, in fp32.
        probe: a number for each adapted module, in the order of their names, by which the client sees that it makes
            the same fixed tensors of the base's weights as the server; empty for adapter kinds that make none.
        control: SCAFFOLD's c, with the shapes of what is trained, for the plan's term "control"; None: zeros.
        counted: number of the last round in which the server used this client's reply for `control`; 0: none.
        masking: how the reply is masked; None: it is not.
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
    sparse: bool = False
    probe: tuple[float, ...] = ()
    control: AdapterState | None = None
    counted: int = 0
    masking: Masking | None = None


@dataclass(frozen=True)
class SecondQuestion:
    """The second question of a round in which updates are sketched in two passes: what is the update on these bases?

    Args:
        round: number of the round, from 1.
        bases: Q of each module, [d_out, width], as tensors "module|Q".
        plan: the plan of the round's broadcasts.
        run: key of the run, as in the broadcast.
    """

    round: int
    bases: AdapterState
    plan: Plan
    run: str = ""


@dataclass(frozen=True)
class ClientUpdate:
    """One client's reply in one round.

    Args:
        client_id: number of the client, as in its `ClientInfo`.
        adapter: the factors after training (not differences). A factor that was not uploaded is empty. If the plan has
            a sketch, it has no factors but tensors of sketches; see `sketches`.
        num_examples: number of the client's training examples, above 0, which is its weight in every mean.
        base_version: the number of folds in the base model on which the client trained.
        metrics: numbers by name, such as train-loss, tokens, seconds.
        start: the adapter from which the client started, as it was sent. The server adds it when it reads the reply; it
            is not sent back.
    """

    client_id: int
    adapter: AdapterState
    num_examples: int
    base_version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: AdapterState | None = None
