"""AdapterState <-> a PEFT model: the trainable adapter, the frozen anchor beside it, and checkpoints on disk.

The model gets its LoRA layers once per process. From then on factors of any rank are set by replacing the
tensors of the layers, so that changing clients costs no injection and no copy of the base. A core R between the
factors, where the adapter has one, is part of the down projection, which then computes R A x.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import AdapterState, LoraFactors, concatenate, delta, relative_error
from fedlora.adapters.kinds.base import AdapterKind, Parts, Place, as_factors
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import AdapterError, ModelError
from fedlora.config import AnchorConfig, LoraConfig, ModelConfig
from fedlora.tasks.base import Task
from fedlora.tasks.registry import task_of

from . import (
    BaseModel,
    base_fingerprint,
    find_targets,
    load_base,
    untie,
)
from .functional import Functional, Mask, Nothing, Sight
from .injection import (
    ADAPTER,
    ANCHOR,
    Down,
    head_parameters,
    inject,
    lora_layers,
    shape_of,
    ties_may_be_adapted,
)
from .injection import shapes as base_shapes
from .parts import constants_of, factored, fp32_copy, has_gradient, place_of, placed, read_parts, trained_parts
from .trainable import Pair, Trainable


@dataclass
class AdaptedModel:
    """A base model with LoRA layers, ready to take any client's factors.

    Attributes:
        layers: base-model module name -> its LoRA layer.
        tensors: parameter name -> parameter trained in full.
        config: what the base was loaded from.
        kind: of the adapters.
        merged: (run id, folds) merged into the weights of an unquantized base.
        constants: (module, rank) -> the kind's constants there, and their `project`; of kinds that make them of the
            weights.
        sights: module -> its sight, of kinds that see the layer.
        mask: the present batch's, for kinds that see it.
    """

    config: ModelConfig
    base: BaseModel
    model: PeftModel
    layers: Mapping[str, LoraLayer]
    tensors: Mapping[str, nn.Parameter]
    kind: AdapterKind
    merged: tuple[object, tuple[AdapterState, ...]] = field(default=(None, ()))
    constants: dict[tuple[str, int], tuple[Parts, float]] = field(
        default_factory=dict[tuple[str, int], tuple[Parts, float]]
    )
    sights: Mapping[str, Sight] = field(default_factory=dict[str, Sight])
    mask: Mask | None = None

    @property
    def task(self) -> Task:
        """What the model learns to do."""
        return task_of(self.config)


# What PEFT calls its layer over each kind of linear layer.
_LAYER = {nn.Linear: "Linear", Conv1D: "Linear", Linear8bitLt: "Linear8bitLt", Linear4bit: "Linear4bit"}
_current: tuple[tuple[object, ...], AdaptedModel] | None = None


def adapted_model(model: ModelConfig, lora: LoraConfig) -> AdaptedModel:
    """The process's one model; loaded on the first call and kept until another base is asked for, or its files
    change.

    Raises:
        ModelError: the base cannot be loaded, no module matches `lora.target-modules`, or PEFT did not make
            the layers that the quantization asks for.
    """
    global _current  # noqa: PLW0603 - one base model per process, shared by all its clients and rounds
    key = (model, base_fingerprint(model), lora.target_modules, lora.dropout, lora.kind, lora.kind_options)
    if _current is None or _current[0] != key:
        _current = None  # let go of the old weights before the new ones are read
        _current = (key, _build(model, lora))
    return _current[1]


def forget() -> None:
    """Drop the model; the next call loads the base anew."""
    global _current  # noqa: PLW0603
    _current = None


def _build(config: ModelConfig, lora: LoraConfig) -> AdaptedModel:
    kind = KINDS.make(lora.kind, lora.kind_options)
    base = load_base(config)
    targets = find_targets(base.model, lora.target_modules, base.heads)
    silent = [name for name in targets if name in base.uncalled and "expert" not in name]
    if silent:
        raise ModelError(
            f"lora.target-modules = {lora.target_modules!r}: {config.name} reads the weights of {silent[0]} without "
            "calling the layer, or does not use it, so that LoRA would have no effect; name other modules"
        )
    model = inject(base.model, targets, lora.dropout)
    layers = lora_layers(model)
    for layer in layers.values():
        layer.lora_A[ADAPTER] = Down(shape_of(layer)[1], cast("Tensor", layer.lora_A[ADAPTER].weight).device)
    for name, layer in layers.items():
        below = layer.get_base_layer()
        expected = next((made for kind, made in _LAYER.items() if type(below) is kind), "Linear")
        if type(layer).__name__ != expected:
            raise ModelError(
                f"{config.name}: LoRA beside {name}, a {type(below).__name__}, needs PEFT's {expected}, and the "
                f"installed peft made a {type(layer).__name__}; name other modules with lora.target-modules, or "
                "choose another model.quantization"
            )
    dense = head_parameters(model, base.heads)
    task_of(config).prepare(model)
    sights = {name: Sight(layer) for name, layer in layers.items()} if kind.sees_layer else {}
    return AdaptedModel(
        config=config,
        base=base,
        model=model,
        layers=layers,
        tensors=dense,
        kind=kind,
        sights=sights,
        mask=Mask(model) if kind.sees_mask else None,
    )


def install(
    model: AdaptedModel,
    adapter: AdapterState,
    train: Iterable[str] = (),
    modules: Collection[str] | None = None,
    folds: tuple[AdapterState, ...] = (),
    *,
    frozen: Collection[str] = (),
) -> Trainable:
    """Set the trainable adapter, the head, and the frozen anchor beside them.

    Args:
        model: the model.
        adapter: one pair of factors for every adapted module, of any ranks, and a core R for any of them.
        train: the factors that are trained, of "A", "B" and "R"; the head is trained whenever anything is.
        modules: those whose factors are trained; None: all.
        folds: frozen updates, added as one adapter; () leaves the base alone.
        frozen: parts of the model's kind that are not trained, by the ends of their names; see `Plan.frozen`.

    Returns:
        What is to be trained.

    Raises:
        AdapterError: modules or shapes do not fit the model.
    """
    wanted = frozenset(train)
    pairs: list[Pair] = []
    parameters: list[nn.Parameter] = []
    if model.kind.pairs:
        _same_names("modules", adapter.lora, model.layers)
        _same_names("tensors trained in full", adapter.tensors, model.tensors)
    else:
        parts = {model.kind.key(name, part) for name, place in _places(model) for part in model.kind.shapes(place)}
        _same_names(f"parts of {model.kind.name}", adapter.tensors, [*model.tensors, *parts])
    for name, layer in model.layers.items():
        own = wanted if modules is None or name in modules else frozenset[str]()
        if not model.kind.pairs:
            parameters += _set_parts(model, name, layer, adapter, bool(own), frozen=frozen)
            continue
        factors = adapter.lora[name]
        a, b = _set_factors(name, layer, ADAPTER, factors, own)
        core = _set_core(name, layer, factors.R, own)
        pair = Pair(name, a, b, factors.scaling, core)
        pairs.append(pair)
        parameters += [p for p in (pair.A, pair.B, core) if p is not None and p.requires_grad]
    for name, parameter in model.tensors.items():
        value = adapter.tensors[name]
        if value.shape != parameter.shape:
            raise AdapterError(f"{name}: got shape {tuple(value.shape)}, the model has {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(value)
        parameter.grad = None
        parameter.requires_grad_(bool(wanted))
        if wanted:
            parameters.append(parameter)
    install_anchor(model, folds)
    return Trainable(pairs, parameters)


def filled(model: AdaptedModel, adapter: AdapterState) -> AdapterState:
    """The adapter, with factors of rank 1 that add nothing in the modules that it lacks.

    Args:
        model: the model; nothing is added for kinds without factors A and B.
        adapter: the adapter that is to be installed.
    """
    if not model.kind.pairs or adapter.lora.keys() >= model.layers.keys():
        return adapter
    lora: dict[str, LoraFactors] = {}
    for name, layer in model.layers.items():
        d_out, d_in = shape_of(layer)
        nothing = LoraFactors(A=torch.zeros(1, d_in), B=torch.zeros(d_out, 1), scaling=1.0)
        lora[name] = adapter.lora.get(name, nothing)
    return AdapterState(lora={**lora, **adapter.lora}, tensors=adapter.tensors)


def untouched(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> AdapterState:
    """An adapter that adds nothing to the base model, with the tensors among these that are trained in full."""
    _same_names("tensors trained in full", tensors.keys() & model.tensors.keys(), model.tensors)
    return filled(model, AdapterState(tensors={name: tensors[name] for name in model.tensors}))


def install_anchor(model: AdaptedModel, folds: tuple[AdapterState, ...]) -> None:
    """Add folds as one frozen adapter beside the trainable one; () leaves the base alone."""
    if folds and ANCHOR not in model.model.peft_config:
        transposed = any(getattr(layer, "fan_in_fan_out", False) for layer in model.layers.values())
        config = PeftLoraConfig(r=1, lora_alpha=1, target_modules=[*model.layers], fan_in_fan_out=transposed)
        with ties_may_be_adapted():
            model.model.add_adapter(ANCHOR, config)
    anchor = concatenate(folds)
    for name, layer in model.layers.items():
        factors = anchor.lora.get(name)
        if factors is not None:
            _set_factors(name, layer, ANCHOR, factors, frozenset())
        layer._active_adapter = [ADAPTER] if factors is None else [ANCHOR, ADAPTER]


def place(
    model: AdaptedModel, folds: tuple[AdapterState, ...], anchor: AnchorConfig, run: object
) -> tuple[AdapterState, ...]:
    """Bring the base's weights to the version that a run's config asks for, whatever an earlier run left in them.

    Args:
        model: the model.
        folds: all folds of the version.
        anchor: with `base-update = merge` the folds are added to the weights; else the weights are the base's own.
        run: whose folds they are.

    Returns:
        The folds that are left to be installed beside the weights, as the anchor.
    """
    merged = anchor.base_update == "merge"
    merge_folds(model, run if merged else None, folds if merged else ())
    return () if merged else folds


def merge_folds(model: AdaptedModel, run: object, folds: tuple[AdapterState, ...]) -> None:
    """Bring the weights of an unquantized base to the version of these folds, adding each once, in order.

    The base is reread from disk when it holds another run's folds, a later version, or a fold that was taken back.
    """
    held_run, held = model.merged
    if held and (held_run != run or len(held) > len(folds) or not _same_fold(held[-1], folds[len(held) - 1])):
        _reload_weights(model)
        held = ()
    with torch.no_grad():
        for fold in folds[len(held) :]:
            for name, factors in fold.lora.items():
                untie(model.model.get_base_model(), name)  # pyright: ignore[reportArgumentType]
                weight = model.layers[name].get_base_layer().weight
                update = delta(factors).to(weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
                transposed = getattr(model.layers[name], "fan_in_fan_out", False)
                weight.add_(update.T if transposed else update)  # pyright: ignore[reportCallIssue]
    model.merged = (run, folds)


def _same_fold(one: AdapterState, other: AdapterState) -> bool:
    """Whether two folds are one, up to the rounding of the number format that carried it."""
    return one is other or (one.lora.keys() == other.lora.keys() and relative_error(one.lora, other.lora) < 0.05)


def _reload_weights(model: AdaptedModel) -> None:
    fresh = load_base(model.config).model
    with torch.no_grad():
        for name, layer in model.layers.items():
            layer.get_base_layer().weight.copy_(cast("Tensor", fresh.get_submodule(name).weight))  # pyright: ignore[reportCallIssue]
    model.merged = (None, ())


def read(model: AdaptedModel) -> AdapterState:
    """The trainable adapter, its cores and the head as they are now, on the CPU in fp32, as copies."""
    lora: dict[str, LoraFactors] = {}
    tensors = {name: fp32_copy(p) for name, p in model.tensors.items()}
    for name, layer in model.layers.items():
        down = layer.lora_A[ADAPTER]
        if isinstance(down, Functional):
            tensors |= read_parts(model.kind, name, dict(down.parts))
            continue
        assert isinstance(down, Down)
        lora[name] = LoraFactors(
            A=fp32_copy(down.weight),
            B=fp32_copy(layer.lora_B[ADAPTER].weight),
            scaling=float(layer.scaling[ADAPTER]),
            R=None if down.core is None else fp32_copy(down.core),
        )
    return AdapterState(lora=lora, tensors=tensors)


def _set_factors(
    name: str, layer: LoraLayer, adapter: str, factors: LoraFactors, trainable: frozenset[str]
) -> tuple[nn.Parameter, nn.Parameter]:
    down, up = cast("nn.Linear", layer.lora_A[adapter]), cast("nn.Linear", layer.lora_B[adapter])
    d_out, d_in = shape_of(layer)
    rank = factors.rank
    if factors.A.shape != (rank, d_in) or factors.B.shape != (d_out, rank):
        raise AdapterError(
            f"{name}: got A {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}, the model needs A [r, {d_in}] "
            f"and B [{d_out}, r]"
        )
    a = nn.Parameter(factors.A.to(down.weight.device, torch.float32, copy=True), requires_grad="A" in trainable)
    b = nn.Parameter(factors.B.to(down.weight.device, torch.float32, copy=True), requires_grad="B" in trainable)
    down.weight, up.weight = a, b
    down.out_features = up.in_features = rank
    layer.r[adapter], layer.lora_alpha[adapter] = rank, factors.scaling * rank  # pyright: ignore
    layer.scaling[adapter] = factors.scaling
    return a, b


def _places(model: AdaptedModel) -> list[tuple[str, Place]]:
    """Each module and where it stands, at a rank that does not matter yet."""
    return [(name, place_of(name, layer)) for name, layer in model.layers.items()]


def _set_parts(
    model: AdaptedModel, name: str, layer: LoraLayer, adapter: AdapterState, trained: bool, *, frozen: Collection[str]
) -> list[nn.Parameter]:
    """Put a module's parts of the model's kind into its layer; those that are trained."""
    device = layer.get_base_layer().weight.device
    place, parts = placed(model.kind, name, layer, adapter)
    own = {
        part: nn.Parameter(
            value.to(device, torch.float32, copy=True),  # pyright: ignore
            requires_grad=has_gradient(model.kind, part, trained, frozen),
        )
        for part, value in parts.items()
    }
    made = Functional(model.kind, place, own, constants_of(model, place), model.sights.get(name) or model.mask)
    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = made, Nothing(made.weight)
    layer.scaling[ADAPTER] = 1.0
    return trained_parts(model.kind, own)


def in_factors(adapter: AdapterState, model: ModelConfig, lora: LoraConfig) -> AdapterState:
    """The adapter of a run as LoRA factors. The base's weights are loaded only for kinds that need them."""
    kind = KINDS.make(lora.kind, lora.kind_options)
    if kind.needs_weight:
        return factored(adapted_model(model, lora), adapter)
    return adapter if kind.pairs else as_factors(adapter, kind, base_shapes(model, lora).lora)


def ranks(model: AdaptedModel, adapter: AdapterState) -> dict[str, int]:
    """The rank of each module's adapter; a module that the adapter lacks is left out."""
    if model.kind.pairs:
        return {name: factors.rank for name, factors in adapter.lora.items()}
    found = {name: model.kind.parts_of(adapter.tensors, place) for name, place in _places(model)}
    return {name: model.kind.rank(parts) for name, parts in found.items() if parts}


def _set_core(name: str, layer: LoraLayer, core: Tensor | None, trainable: frozenset[str]) -> nn.Parameter | None:
    """The module's core, or none: one of an earlier adapter is dropped."""
    down = cast("Down", layer.lora_A[ADAPTER])
    rank = down.out_features
    if core is None:
        down.core = None
        return None
    if core.shape != (rank, rank):
        raise AdapterError(
            f"{name}: got a core R {tuple(core.shape)}, its factors of rank {rank} need ({rank}, {rank})"
        )
    value = core.to(down.weight.device, torch.float32, copy=True)
    down.core = nn.Parameter(value, requires_grad="R" in trainable)
    return down.core


def _same_names(what: str, got: Iterable[str], expected: Iterable[str]) -> None:
    odd = sorted(set(got) ^ set(expected))
    if odd:
        raise AdapterError(
            f"the adapter's {what} are not the model's, for instance {odd[0]!r}; both sides need the same model.name "
            "and lora.target-modules"
        )
