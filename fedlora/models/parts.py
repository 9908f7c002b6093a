"""The parts of adapter kinds other than LoRA in a model's layers, and what a kind makes of the frozen weights.

Tensors that a kind makes of the weights are made once for a model and a rank. They are never sent, so that server and
clients have to make the same ones: the server sends a number for each module, and clients compare theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import MAGNITUDE, WEIGHT, AdapterKind, Parts, Place, as_factors, project
from fedlora.common.errors import AdapterError, ModelError

from .injection import shape_of
from .weights import weight_of

if TYPE_CHECKING:
    from .adapted import AdaptedModel

# How far a machine's numbers may be from another's, which are of the order of 1: rounding, but no other vector.
_SAME = 0.01


def place_of(name: str, layer: LoraLayer) -> Place:
    """Where a module stands, at a rank that does not matter yet."""
    return Place(name, *shape_of(layer), rank=1)


def placed(kind: AdapterKind, name: str, layer: LoraLayer, adapter: AdapterState) -> tuple[Place, dict[str, Tensor]]:
    """Where a module's adapter stands, and its parts.

    Raises:
        AdapterError: their shapes are not the kind's.
    """
    bare = place_of(name, layer)
    parts = kind.parts_of(adapter.tensors, bare)
    place = replace(bare, rank=kind.rank(parts))
    expected = kind.shapes(place)
    for part, value in parts.items():
        if tuple(value.shape) != tuple(expected[part]):
            raise AdapterError(
                f"{name}: got {kind.name}'s {part} {tuple(value.shape)}, the model needs {tuple(expected[part])}"
            )
    return place, parts


def has_gradient(kind: AdapterKind, part: str, trained: bool, frozen: Collection[str]) -> bool:
    """Whether a part gets a gradient in a module that is trained, or not; see `Plan.frozen`."""
    return trained and f"{kind.name}_{part}" not in frozen


def trained_parts(kind: AdapterKind, parts: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parts that an optimizer changes: those with a gradient, but not the one that counts."""
    return [value for part, value in parts.items() if part != kind.counted and value.requires_grad]


def read_parts(kind: AdapterKind, module: str, parts: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of a module's parts, under their names in an adapter, on the CPU in fp32. Counts are read as shares."""
    return {kind.key(module, part): fp32_copy(_shares(v) if part == kind.counted else v) for part, v in parts.items()}


def _shares(counted: nn.Parameter) -> Tensor:
    """The counts in this part's gradient over their sum; the part as it is, if nothing was counted."""
    counts = counted.grad
    return counted if counts is None or not counts.any() else counts / counts.sum()


def fp32_copy(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().to("cpu", torch.float32, copy=True)


def constants_of(model: AdaptedModel, place: Place) -> Parts:
    """The constants of the model's kind at a place; those that are made of the base's weights are made once."""
    return _made(model, place)[0] if model.kind.needs_weight else model.kind.constants(place)


def _made(model: AdaptedModel, place: Place) -> tuple[Parts, float]:
    """The constants of a kind that makes them of the base's weights, and their `project`.

    Raises:
        AdapterError: folds are merged into the weights, which are not the base's own any more.
    """
    if model.merged[1]:
        raise AdapterError(
            f"lora.kind: {model.kind.name} needs the base's own weights, into which folds are merged; set "
            "anchor.base-update = anchor"
        )
    key = place.module, place.rank
    if key not in model.constants:
        layer = model.layers[place.module]
        made = model.kind.constants(replace(place, weight=lambda: weight_of(layer)))
        model.constants[key] = made, project(made)
    return model.constants[key]


def factored(model: AdaptedModel, adapter: AdapterState) -> AdapterState:
    """The adapter as LoRA factors, of a kind that may need the base's weights for it."""

    def constants(place: Place) -> Parts:
        found = constants_of(model, place)
        return {**found, WEIGHT: model.sights[place.module].weight.cpu()} if model.kind.sees_layer else found

    shapes = {name: shape_of(layer) for name, layer in model.layers.items()}
    return as_factors(adapter, model.kind, shapes, constants)


def with_parts(model: AdaptedModel, adapter: AdapterState) -> AdapterState:
    """The adapter of a DoRA checkpoint as parts of the model's kind, the reverse of `factored`."""
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in model.tensors}
    for name, factors in adapter.lora.items():
        place = replace(place_of(name, model.layers[name]), rank=factors.rank)
        size = adapter.tensors[f"{name}.{MAGNITUDE}"]
        parts = model.kind.of_magnitude(factors, size, constants_of(model, place))
        tensors |= {model.kind.key(name, part): value for part, value in parts.items()}
    return AdapterState(tensors=tensors)


def probe(model: AdaptedModel, adapter: AdapterState) -> tuple[float, ...]:
    """A number for each module, in order, that tells which constants this machine makes of the base's weights.

    Nothing for kinds that make their constants without them.
    """
    if not model.kind.needs_weight:
        return ()
    found = [placed(model.kind, name, model.layers[name], adapter)[0] for name in sorted(model.layers)]
    return tuple(_made(model, place)[1] for place in found)


def check_probe(model: AdaptedModel, adapter: AdapterState, sent: Sequence[float]) -> None:
    """Compare the server's `probe` with this machine's.

    Raises:
        ModelError: they differ, so that the same parts would not be the same update.
    """
    own = probe(model, adapter)
    if len(own) != len(sent):
        raise ModelError(
            f"the server sent {len(sent)} numbers on the fixed tensors of {model.kind.name}, expected {len(own)}"
        )
    for name, mine, theirs in zip(sorted(model.layers), own, sent, strict=False):
        if abs(mine - theirs) > _SAME:
            raise ModelError(
                f"{name}: the fixed tensors that {model.kind.name} makes of the base's weight are not the server's "
                f"(projection {mine:.4f}, expected {theirs:.4f}); use the same model.quantization, and versions of "
                "torch and bitsandbytes, on all machines"
            )
