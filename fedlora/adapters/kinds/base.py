"""The base class of adapter kinds: the trained parts beside a linear layer, and what they add to its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algebra import stack
from ..state import AdapterState, LoraFactors

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """The linear layer to which an adapter belongs.

    Args:
        module: name of the layer in the base model.
        d_out: number of the layer's outputs.
        d_in: number of the layer's inputs.
        rank: rank of the adapter.
        scaling: LoRA's scaling at this rank, for kinds that have a scaling.
    """

    module: str
    d_out: int
    d_in: int
    rank: int
    scaling: float = 1.0


class AdapterKind(ABC):
    """A kind of adapter. A subclass is a frozen dataclass whose fields are its options.

    The trained parts of a layer are tensors by name. They are sent and averaged as `AdapterState.tensors`, under the
    names "<module>.<kind>_<part>". `forward` must use torch functions only, so that one call of `torch.vmap` can run
    several clients at once.

    Attributes:
        name: beginning of the parts' names; letters and digits only.
        pairs: True if the parts are LoRA's A and B, which are sent as `AdapterState.lora`.
        linear: True if the mean of the parts gives the mean of the updates, so that averaging is exact.
    """

    name: ClassVar[str]
    pairs: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def check(self, rank: int) -> None:  # noqa: B027 - most serve any rank
        """Check that the kind works at this rank of a module.

        Raises:
            ConfigError: it does not.
        """

    @abstractmethod
    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        """The shapes of the trained parts, by name."""

    @abstractmethod
    def rank(self, parts: Parts) -> int:
        """The rank of these parts."""

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts before round 1. Their update must be zero; by default, all parts are zeros."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(place).items()}

    def constants(self, place: Place) -> dict[str, Tensor]:
        """Tensors that are never trained and never sent, since server and clients compute the same ones."""
        return {}

    @abstractmethod
    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        """The tensor that is added to the layer's output.

        Args:
            x: the layer's input, [..., d_in].
            parts: the trained parts.
            constants: the tensors of `constants`.
            place: the layer.

        Returns:
            A tensor [..., d_out].
        """

    @abstractmethod
    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        """The same update as factors B and A, for checkpoints, exports and spectra."""

    def after_round(self, before: Sequence[Parts], after: Sequence[Parts], share: float) -> Sequence[Parts]:
        """The shared parts of all modules after a round, as the server changes them; by default, they stay as they are.

        Args:
            before: each module's parts before the round.
            after: each module's parts as the strategy aggregated them.
            share: the share of the run's rounds that are over.
        """
        return after

    def key(self, module: str, part: str) -> str:
        """The name of a module's part among an adapter's tensors."""
        return f"{module}.{self.name}_{part}"

    def parts_of(self, tensors: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        """One module's parts, taken from an adapter's tensors; parts that are missing are left out."""
        keys = {part: self.key(place.module, part) for part in self.shapes(place)}
        return {part: tensors[key] for part, key in keys.items() if key in tensors}


def after_round(
    before: AdapterState,
    after: AdapterState,
    kind: AdapterKind,
    shapes: Mapping[str, tuple[int, int]],
    share: float,
) -> AdapterState:
    """The shared adapter as its kind changes it between rounds.

    Args:
        before: the adapter from which the round started.
        after: the adapter as the strategy aggregated it.
        kind: the adapter's kind.
        shapes: module -> (d_out, d_in).
        share: the share of the run's rounds that are over.
    """
    places = [Place(module, d_out, d_in, rank=1) for module, (d_out, d_in) in shapes.items()]
    old, new = ([kind.parts_of(a.tensors, place) for place in places] for a in (before, after))
    changed = kind.after_round(old, new, share)
    if changed is new:
        return after
    parts = {
        kind.key(place.module, part): value
        for place, own in zip(places, changed, strict=True)
        for part, value in own.items()
    }
    return AdapterState(lora=after.lora, tensors={**after.tensors, **parts})


def as_factors(adapter: AdapterState, kind: AdapterKind, shapes: Mapping[str, tuple[int, int]]) -> AdapterState:
    """The adapter with the parts of its kind converted to LoRA factors. Other factors and tensors are kept.

    Args:
        adapter: an adapter of this kind.
        kind: the adapter's kind.
        shapes: module -> (d_out, d_in).
    """
    if kind.pairs:
        return adapter
    lora, tensors = dict(adapter.lora), dict(adapter.tensors)
    for module, (d_out, d_in) in shapes.items():
        place = Place(module, d_out, d_in, rank=1)
        parts = kind.parts_of(adapter.tensors, place)
        if not parts:
            continue
        place = Place(module, d_out, d_in, rank=kind.rank(parts))
        found = kind.factors(parts, kind.constants(place), place)
        lora[module] = stack([lora[module], found]) if module in lora else found
        for part in parts:
            del tensors[kind.key(module, part)]
    return AdapterState(lora=lora, tensors=tensors)
