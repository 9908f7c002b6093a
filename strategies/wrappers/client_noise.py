"""Differential privacy of whole clients: changes are clipped, summed and given noise before the strategy sees them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters import AdapterState, first_ranks, keep_factors, to_fp32
from fedlora.adapters.state import is_missing
from fedlora.common.errors import StrategyError
from fedlora.common.noise import Noise
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.replies import arrivals
from .distances import started_from
from .wrapper import Wrapper, innermost

MEMORY = "privacy"  # the numbers of the last round, and the clip of the next one
CLEARNESS = "signal-to-noise."  # before a module's name, among these
_SHARE_OF_COUNT = 0.1  # of the budget of a round: for the count behind an adaptive clip


@dataclass(frozen=True)
class ClientNoise(Wrapper):
    """One reply for all: `start + (sum_k min(1, C/|d_k|) d_k + N(0, (z C)^2)) / m`, with d_k what client k changed.

    McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", https://arxiv.org/abs/1710.06963,
    Algorithm 1, with a fixed denominator. d_k is all that client k sent, as one vector: the changes of the factors at
    the server's scaling, with zeros for the ranks that it lacks, and those of tensors trained in full. All clients
    count alike, whatever they say about their rows, or with a cap by `min(1, n_k / cap)`, and m is the number of
    clients that a round asks, whoever answers and however they weigh: without one client the sum differs by at most C,
    and nothing else does. What the inner strategy, an optimizer or a
    restart makes of the one reply costs no more privacy.

    With a quantile, C moves: `C <- C exp(-rate (b - quantile))`, with b the share of the norms that are at most C,
    plus noise. Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
    https://arxiv.org/abs/1905.03871, Algorithm 1 and Theorem 1: the noise of the sum grows to z_D and that of the count
    is s_b, with `1/z^2 = 1/z_D^2 + 1/(2 s_b)^2`, so that both releases together cost what one with z does. Here the
    count has a tenth of that, where the paper has s_b = m / 20, which few clients do not allow.
    Memory: one reply.

    Args:
        inner: a strategy that `serves` accepts.
        clip: C, or the C of the first round.
        noise_multiplier: z.
        clients: m.
        quantile: of the norms, to which C moves; 0: C stays.
        rate: how fast it moves.
        cap: number of rows from which on a client weighs 1; 0: all do.
        key: of the noise, for tests alone; None: fresh entropy in each round.

    Attributes:
        releases: number of sums with noise z in each round, to be accounted for.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    clients: int = 1
    quantile: float = 0.0
    rate: float = 0.2
    cap: int = 0
    key: bytes | None = None

    releases: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.serves(self.inner):
            raise StrategyError(
                f"privacy.level = client adds noise to a sum, and {type(innermost(self.inner)).__name__} needs the "
                "clients' own factors; set privacy.level = example",
                needs="linear or of_ideal",
            )

    @classmethod
    def serves(cls, inner: Strategy) -> bool:
        """Whether the strategy can be given one reply that stands for all."""
        return inner.linear

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """What the inner strategy makes of the one reply that stands for all.

        Raises:
            StrategyError: no reply arrived.
        """
        held = state.memory.get(MEMORY)
        clip = float(held.tensors["clip"]) if held and self.quantile else self.clip
        noise = Noise(self.key)
        deviation = clip * self.noise_multiplier / math.sqrt(1 - _SHARE_OF_COUNT if self.quantile else 1)
        sent = self._largest(state, number)
        made = self._released(state, sent, arrivals(updates, number), clip=clip, deviation=deviation, noise=noise)
        within = made.within
        facts = {"clip": clip, "used": clip, "clipped": 1 - sum(within) / len(within)}
        if self.quantile:
            of_count = self.noise_multiplier / (2 * math.sqrt(_SHARE_OF_COUNT * self.releases))
            halves = sum(within) - len(within) / 2 + float(noise.normal((1,), of_count)[0])
            share = halves / self.clients + 0.5
            facts |= {"clip": clip * math.exp(-self.rate * (share - self.quantile)), "clipped": 1 - share}
        facts |= made.clearness
        new = self.inner.aggregate(state, [made.reply], number)
        told = AdapterState(tensors={name: torch.tensor(value, dtype=torch.float64) for name, value in facts.items()})
        return replace(new, memory={**new.memory, MEMORY: told})

    def _released(
        self,
        state: ServerState,
        sent: Broadcast,
        updates: Iterable[ClientUpdate],
        *,
        clip: float,
        deviation: float,
        noise: Noise,
    ) -> Released:
        """Clip and add up the clients' changes, and add noise.

        Args:
            state: before the round.
            sent: to a client of the server's own ranks.
            updates: of the round, at least one.
            clip: of this round.
            deviation: of the noise in each number that is released.
            noise: where it comes from.
        """
        total = {name: torch.zeros_like(tensor) for name, tensor in sent_by_name(sent.adapter, sent.plan).items()}
        within = []
        for update in updates:
            change = change_of(update, sent.adapter)
            length = length_of(change)
            within.append(length <= clip)
            for name, tensor in change.items():
                total[name].add_(tensor, alpha=self._share(update, length, clip))
        noised(total, deviation, noise)
        reply = ClientUpdate(
            client_id=0,
            adapter=_moved(sent, {name: tensor / self.clients for name, tensor in total.items()}),
            num_examples=1,
            base_version=sent.base_version,
            start=sent.adapter,
        )
        return Released(reply, within, clearness(total, deviation))

    def _share(self, update: ClientUpdate, length: float, clip: float) -> float:
        """What a client's change is multiplied by: at most what brings its length to the clip."""
        weight = min(1.0, update.num_examples / self.cap) if self.cap else 1.0
        return weight * (min(1.0, clip / length) if length else 1.0)

    def _largest(self, state: ServerState, number: int) -> Broadcast:
        """What a client of the server's own ranks would be sent, at the server's scalings."""
        ranks = {name: factors.rank for name, factors in state.adapter.lora.items()}
        whole = ClientInfo(
            client_id=0,
            rank=max(ranks.values(), default=1),
            known_base_version=state.folds.version,
            ranks=ranks,
        )
        sent = self.inner.broadcast(state, whole, number)
        lora = {name: first_ranks(f, f.rank, state.adapter.lora[name].scaling) for name, f in sent.adapter.lora.items()}
        tensors = {name: to_fp32(tensor) for name, tensor in sent.adapter.tensors.items()}
        return replace(sent, adapter=AdapterState(lora=lora, tensors=tensors))


@dataclass(frozen=True)
class Released:
    """What a round's clients gave together.

    Args:
        reply: stands for all of them; what is made of it costs no privacy.
        within: for each client, whether its change was no longer than the clip. Not to be told without noise.
        clearness: see `clearness`.
    """

    reply: ClientUpdate
    within: list[bool]
    clearness: Mapping[str, float]


def noised(sums: Mapping[str, Tensor], deviation: float, noise: Noise) -> None:
    """Add N(0, deviation^2) to every number of these tensors, in place."""
    for tensor in sums.values():
        tensor.add_(torch.from_numpy(noise.normal(tensor.shape, deviation)).to(tensor))


def change_of(update: ClientUpdate, at: AdapterState) -> dict[str, Tensor]:
    """All that a client changed, as tensors by name, with the shapes and scalings of `at`.

    Args:
        update: the reply; its `start` says what the client was sent.
        at: an adapter of the largest ranks. A client of a smaller rank has its first rows.
    """
    begun = started_from(update)
    change: dict[str, Tensor] = {}
    for name, end in update.adapter.lora.items():
        start, whole = begun.lora[name], at.lora[name]
        if not is_missing(end.A):
            moved = (end.scaling * to_fp32(end.A) - start.scaling * to_fp32(start.A)) / whole.scaling
            change[f"{name}.A"] = F.pad(moved, (0, 0, 0, whole.rank - len(moved)))
        if not is_missing(end.B):
            moved = to_fp32(end.B) - to_fp32(start.B)
            change[f"{name}.B"] = F.pad(moved, (0, whole.rank - moved.shape[1]))
        if end.R is not None and start.R is not None:
            moved = to_fp32(end.R) - to_fp32(start.R)
            change[f"{name}.R"] = F.pad(moved, (0, whole.rank - len(moved)) * 2)
    for name, tensor in update.adapter.tensors.items():
        change[name] = to_fp32(tensor) - to_fp32(begun.tensors[name])
    return change


def length_of(change: Mapping[str, Tensor]) -> float:
    """The norm of all tensors as one vector, in fp64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in change.values()))


def sent_by_name(adapter: AdapterState, plan: Plan) -> dict[str, Tensor]:
    """What a plan lets a client send, as tensors by name; see `change_of`."""
    whole = keep_factors(plan.sent_back(adapter), plan.send)
    factors = {f"{name}.{which}": getattr(f, which) for name, f in whole.lora.items() for which in "ABR"}
    return {n: t for n, t in factors.items() if t is not None and not is_missing(t)} | dict(whole.tensors)


def _moved(sent: Broadcast, by: Mapping[str, Tensor]) -> AdapterState:
    """What a client would send that changed its start by these tensors."""
    whole = keep_factors(sent.plan.sent_back(sent.adapter), sent.plan.send)
    lora = {
        name: replace(
            f,
            A=f.A if is_missing(f.A) else f.A + by[f"{name}.A"],
            B=f.B if is_missing(f.B) else f.B + by[f"{name}.B"],
            R=None if f.R is None else f.R + by[f"{name}.R"],
        )
        for name, f in whole.lora.items()
    }
    return AdapterState(lora=lora, tensors={name: tensor + by[name] for name, tensor in whole.tensors.items()})


def clearness(total: Mapping[str, Tensor], deviation: float) -> dict[str, float]:
    """For each module, an estimate of the sum's norm over the noise's, from what is released alone."""
    squares: dict[str, tuple[float, int]] = {}
    for name, tensor in total.items():
        module = re.sub(r"\.[ABRP]$", "", name)
        so_far, count = squares.get(module, (0.0, 0))
        squares[module] = so_far + float(tensor.double().square().sum()), count + tensor.numel()
    noise = {module: count * deviation**2 for module, (_, count) in squares.items()}
    return {
        f"{CLEARNESS}{module}": math.sqrt(max(0.0, square / noise[module] - 1))
        for module, (square, _) in squares.items()
        if noise[module]
    }
