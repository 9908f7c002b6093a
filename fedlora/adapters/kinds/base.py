"""The base class of adapter kinds: the trained parts beside a linear layer, and what they add to its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.common.errors import AdapterError, ConfigError

from ..algebra import stack
from ..state import AdapterState, LoraFactors
from .signs import signs

Parts = Mapping[str, Tensor]
WEIGHT, OUTPUT = "W", "y"  # what a kind that sees the layer gets beside its constants
MASK = "mask"  # what a kind that sees the batch's mask gets beside them
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name


def _unknown() -> Tensor:
    raise AdapterError("the layer's frozen weight is not known here; load the base model first")


@dataclass(frozen=True)
class Place:
    """The linear layer to which an adapter belongs.

    Args:
        module: name of the layer in the base model.
        d_out: number of the layer's outputs.
        d_in: number of the layer's inputs.
        rank: rank of the adapter.
        scaling: LoRA's scaling at this rank, for kinds that have a scaling.
        weight: gives the layer's frozen weight [d_out, d_in], dequantized, for kinds with `needs_weight`.
    """

    module: str
    d_out: int
    d_in: int
    rank: int
    scaling: float = 1.0
    weight: Callable[[], Tensor] = field(default=_unknown, compare=False, repr=False)


class AdapterKind(ABC):
    """A kind of adapter. A subclass is a frozen dataclass whose fields are its options.

    The trained parts of a layer are tensors by name. They are sent and averaged as `AdapterState.tensors`, under the
    names "<module>.<kind>_<part>". `forward` must use torch functions only, so that one call of `torch.vmap` can run
    several clients at once.

    Attributes:
        name: beginning of the parts' names; letters and digits only.
        pairs: True if the parts are LoRA's A and B, which are sent as `AdapterState.lora`.
        linear: True if the mean of the parts gives the mean of the updates, so that averaging is exact.
        needs_weight: True if `constants` are made of the layer's frozen weight, `place.weight()`. They are then made
            once for a model and a rank, also on the server, which loads the base's weights for them.
        sees_layer: True if `forward` finds two more tensors among its constants, and `factors` the first of them: the
            layer's frozen weight "W" [d_out, d_in], and "y" [..., d_out], the layer's own output without a bias. It
            implies `needs_weight`. Under dropout, x has been through it, and y has not.
        sees_mask: True if `forward` finds one more tensor among its constants: "mask" [...], which is 1 where x is a
            token's and 0 where it is padding's.
        dense: True if `forward` keeps a matrix of the weight's size for each client until the backward pass.
        factored: False if `factors` are the update only together with a `magnitude`, as in DoRA.
        matrix: False if what is added to the output is no fixed matrix times x. Such an adapter has no `factors`: it is
            saved as its parts, and cannot be a LoRA checkpoint, or merged.
        personal: parts that stay on the client from round to round, and are never sent to the server.
        others: a part -> the part whose mean over the other clients it holds. The server sends such means, and clients
            neither train them nor send them back. Each client goes on from its own parts, which the server keeps.
        groups: groups of parts of equal size, for a kind of which clients of smaller ranks train some groups: those of
            half the largest rank train half of them. (): such a kind needs one rank. `rank` of some groups is their
            share of the rank. All groups are in the forward pass of every client.
        counted: a part [E, 1] that no optimizer trains, for a kind with E experts; "": none. `forward` counts in the
            gradient of this part how many tokens each expert had. What a client sends are shares, whose sum is 1.
        routed: the parts [E, ...] whose slices are averaged over clients by these shares too; see `counted`.
    """

    name: ClassVar[str]
    pairs: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    needs_weight: ClassVar[bool] = False
    sees_layer: ClassVar[bool] = False
    sees_mask: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    factored: ClassVar[bool] = True
    matrix: ClassVar[bool] = True
    personal: ClassVar[frozenset[str]] = frozenset()
    others: ClassVar[Mapping[str, str]] = MappingProxyType({})
    counted: ClassVar[str] = ""
    routed: ClassVar[frozenset[str]] = frozenset()

    @property
    def groups(self) -> tuple[frozenset[str], ...]:
        return ()

    def check(self, rank: int) -> None:  # noqa: B027 - most serve any rank
        """Check that the kind works at this rank of a module.

        Raises:
            ConfigError: it does not.
        """

    def check_place(self, place: Place) -> None:  # noqa: B027 - most serve any layer
        """Check that the kind works in this layer, before its weight is known.

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
        """Tensors that are never trained and never sent, since server and clients compute the same ones.

        They must not depend on the machine. With `needs_weight`, what a decomposition leaves open, such as the signs of
        singular vectors, has to be fixed; the server sends a number for each module with which clients compare theirs.
        """
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
        """The same update as factors B and A, for checkpoints, exports and spectra.

        Unless `factored`, they are those that belong to a `magnitude`.
        """

    def magnitude(self, parts: Parts, constants: Parts, place: Place) -> Tensor:
        """The norms [d_out] of the rows of W + dW, for a kind whose checkpoint is PEFT's DoRA: it has no small B A."""
        raise AdapterError(f"{self.name} has no magnitude")

    def of_magnitude(self, factors: LoraFactors, magnitude: Tensor, constants: Parts) -> dict[str, Tensor]:
        """The parts of which `factors` and `magnitude` are made, for a kind that has one."""
        raise AdapterError(f"{self.name} has no magnitude")

    def settled(self, parts: Parts) -> Parts:
        """The same update by the parts that a client sends back after training; by default, they stay as they are."""
        return parts

    def after_round(self, before: Sequence[Parts], after: Sequence[Parts], share: float) -> Sequence[Parts]:
        """The shared parts of all modules after a round, as the server changes them; by default, they stay as they are.

        Args:
            before: each module's parts before the round.
            after: each module's parts as the strategy aggregated them.
            share: the share of the run's rounds that are over.
        """
        return after

    @property
    def adds_to_loss(self) -> bool:
        """Whether `forward` adds a term to the loss by itself, once for each pass through the model."""
        return False

    def key(self, module: str, part: str) -> str:
        """The name of a module's part among an adapter's tensors."""
        return f"{module}.{self.name}_{part}"

    @property
    def kept(self) -> frozenset[str]:
        """The ends of the personal parts' names among an adapter's tensors; see `key`."""
        return frozenset(f"{self.name}_{part}" for part in self.personal)

    def parts_of(self, tensors: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        """One module's parts, taken from an adapter's tensors; parts that are missing are left out."""
        keys = {part: self.key(place.module, part) for part in self.shapes(place)}
        return {part: tensors[key] for part, key in keys.items() if key in tensors}


def check_positive(kind: str, **options: float) -> None:
    """Raise ConfigError unless each of these options of a kind is a finite number above 0."""
    for option, value in options.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"lora.kind-options: {kind}'s {option} = {value}, expected a number above 0")


def settled(adapter: AdapterState, kind: AdapterKind, modules: Iterable[str]) -> AdapterState:
    """A client's adapter after training, as its kind sends it back.

    Args:
        adapter: all of it.
        kind: the adapter's kind.
        modules: the adapted modules.
    """
    tensors = dict(adapter.tensors)
    for module in modules:
        if parts := kind.parts_of(tensors, Place(module, 1, 1, rank=1)):
            tensors |= {kind.key(module, part): value for part, value in kind.settled(parts).items()}
    return AdapterState(lora=adapter.lora, tensors=tensors)


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


def as_factors(
    adapter: AdapterState,
    kind: AdapterKind,
    shapes: Mapping[str, tuple[int, int]],
    constants: Callable[[Place], Parts] | None = None,
) -> AdapterState:
    """The adapter with the parts of its kind converted to LoRA factors. Other factors and tensors are kept.

    A kind's magnitudes become tensors "<module>.lora_magnitude_vector", as in PEFT. An adapter whose kind adds no fixed
    matrix stays as it is.

    Args:
        adapter: an adapter of this kind.
        kind: the adapter's kind.
        shapes: module -> (d_out, d_in).
        constants: gives the kind's constants at a place; by default `kind.constants`, for kinds without `needs_weight`.
    """
    if kind.pairs or not kind.matrix:
        return adapter
    lora, tensors = dict(adapter.lora), dict(adapter.tensors)
    for module, (d_out, d_in) in shapes.items():
        place = Place(module, d_out, d_in, rank=1)
        parts = kind.parts_of(adapter.tensors, place)
        if not parts:
            continue
        place = Place(module, d_out, d_in, rank=kind.rank(parts))
        fixed = (constants or kind.constants)(place)
        found = kind.factors(parts, fixed, place)
        lora[module] = stack([lora[module], found]) if module in lora else found
        if not kind.factored:
            tensors[f"{module}.{MAGNITUDE}"] = kind.magnitude(parts, fixed, place)
        for part in parts:
            del tensors[kind.key(module, part)]
    return AdapterState(lora=lora, tensors=tensors)


def whole(update: Tensor) -> LoraFactors:
    """An update of full rank as factors: one of them is the update, the other one the identity."""
    d_out, d_in = update.shape
    if d_out <= d_in:
        return LoraFactors(A=update, B=torch.eye(d_out).to(update), scaling=1.0)
    return LoraFactors(A=torch.eye(d_in).to(update), B=update, scaling=1.0)


def project(constants: Parts) -> float:
    """A number by which two machines tell whether they hold the same constants: their sum over random signs, in fp64.

    It is of the order of 1, whatever the size of the constants, and another sign or order of one vector changes it.
    """
    total = 0.0
    for name, value in sorted(constants.items()):
        matrix = value.detach().to("cpu", torch.float64)
        matrix = matrix.reshape(len(matrix), -1)
        left, right = (signs(f"project.{name}.{side}", 0, size).double() for side, size in enumerate(matrix.shape))
        total += float(left @ matrix @ right / matrix.norm().clamp(min=torch.finfo(torch.float64).tiny))
    return total
