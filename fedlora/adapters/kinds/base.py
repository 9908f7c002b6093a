"""An adapter kind: the trainable parts beside one linear layer, and what they do to its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algebra import stack
from ..state import AdapterState, LoraFactors

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where an adapter stands.

    Args:
        module: the linear layer's name in the base model.
        d_out: its outputs.
        d_in: its inputs.
        rank: of the adapter.
        scaling: of LoRA at this rank, for kinds that have one.
    """

    module: str
    d_out: int
    d_in: int
    rank: int
    scaling: float = 1.0


class AdapterKind(ABC):
    """A frozen dataclass whose fields are its options.

    The trained parts are tensors by name. They travel and are averaged as `AdapterState.tensors`, under
    "<module>.<kind>_<part>". A kind uses torch functions alone in `forward`, so that one call of `torch.vmap` runs
    several clients at once.

    Attributes:
        name: begins the names of the parts; letters and digits.
        pairs: True if the parts are LoRA's A and B, which travel as `AdapterState.lora`.
        linear: True if the mean of the parts is the mean of the updates, so that averaging is exact.
    """

    name: ClassVar[str]
    pairs: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        """The shapes of the trained parts."""

    @abstractmethod
    def rank(self, parts: Parts) -> int:
        """The rank that these parts have."""

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts before round 1, of an update of zero; zeros unless a kind says otherwise."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(place).items()}

    def constants(self, place: Place) -> dict[str, Tensor]:
        """Tensors that are never trained and never sent: the same wherever they are made."""
        return {}

    @abstractmethod
    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        """What is added to the layer's output: [..., d_in] -> [..., d_out]."""

    @abstractmethod
    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        """The same update as B A, for checkpoints, exports and spectra."""

    def key(self, module: str, part: str) -> str:
        """The name of a part among an adapter's tensors."""
        return f"{module}.{self.name}_{part}"

    def parts_of(self, tensors: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        """One module's parts out of an adapter's tensors; those that are missing are left out."""
        keys = {part: self.key(place.module, part) for part in self.shapes(place)}
        return {part: tensors[key] for part, key in keys.items() if key in tensors}


def as_factors(adapter: AdapterState, kind: AdapterKind, shapes: Mapping[str, tuple[int, int]]) -> AdapterState:
    """The adapter with every module's parts as LoRA factors, beside the factors and tensors that it has.

    Args:
        adapter: of this kind.
        kind: of the adapter.
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
