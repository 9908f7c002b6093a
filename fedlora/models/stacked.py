"""Several clients' adapters in one PEFT model: one batch goes through the shared base, with an adapter for each client.

The rows of a batch belong to the clients in equal parts, client after client. The A of all clients are one tensor
[clients, r_max, d_in], and the B are one tensor [clients, r_max, d_out], transposed, so that a rank is a row in both.
If a client's rank is smaller, the other rows are zeros. A client's parameters are views of its own rows (those of B
transposed back to [d_out, r]), and so are its gradients. An optimizer with one client's views does the same as for a
client alone, and never sees the zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import AdapterError
from fedlora.tasks.groups import Groups

from .adapted import AdaptedModel, install, install_anchor
from .functional import Functional, FunctionalStack, Nothing
from .injection import ADAPTER
from .parts import fp32_copy, has_gradient, placed, read_parts, trained_parts
from .trainable import Pair, Trainable


class NotStackable(AdapterError):
    """This model cannot train several clients in one batch, but only one client at a time."""


class _Layer:
    """One module's factors of all clients."""

    def __init__(self, factors: Sequence[LoraFactors], cores: Sequence[Tensor | None], device: torch.device) -> None:
        self.ranks = [f.rank for f in factors]
        self.A = _stacked([f.A for f in factors], device)
        self.B = _stacked([f.B.T for f in factors], device)
        self.scalings = [f.scaling for f in factors]  # kept as numbers, since a tensor would round them to fp32
        self.scaling = torch.tensor(self.scalings, device=device)[:, None, None]
        self.cores = None if cores[0] is None else [_own(cast("Tensor", core), device) for core in cores]

    def views(self, seat: int) -> tuple[nn.Parameter, nn.Parameter]:
        rank = self.ranks[seat]
        a, b = (stack.detach()[seat, :rank] for stack in (self.A, self.B))
        return nn.Parameter(a), nn.Parameter(b.T)


class _Down(nn.Module):
    """x -> scaling R A x, with each client's own factors for its rows; takes the place of PEFT's lora_A."""

    def __init__(self, layer: _Layer, stack: Stack) -> None:
        super().__init__()
        self.weight, self._layer, self._stack = layer.A, layer, stack

    def forward(self, x: Tensor) -> Tensor:
        seats = self._stack.check(x)
        down = self._by_seat(x, seats)
        if self._layer.cores is not None:
            top = self.weight.shape[1]
            padded = [F.pad(core, (0, top - len(core), 0, top - len(core))) for core in self._layer.cores[:seats]]
            down = down @ torch.stack(padded).mT
        return (down * self._layer.scaling[:seats]).reshape(*x.shape[:-1], -1)

    @property
    def core(self) -> Tensor | None:
        """The first client's, which says whether there are any and whether they are trained."""
        return None if self._layer.cores is None else self._layer.cores[0]

    def before_core(self, x: Tensor) -> Tensor:
        """A x, without the scaling."""
        return self._by_seat(x, self._stack.active).reshape(*x.shape[:-1], -1)

    def _by_seat(self, x: Tensor, seats: int) -> Tensor:
        return x.reshape(seats, -1, x.shape[-1]) @ _first(self.weight, seats).mT


class _Up(nn.Module):
    """z -> B z, with each client's own B for its rows; takes the place of PEFT's lora_B."""

    def __init__(self, layer: _Layer, stack: Stack) -> None:
        super().__init__()
        self.weight, self._stack = layer.B, stack

    def forward(self, z: Tensor) -> Tensor:
        seats = self._stack.active
        return (z.reshape(seats, -1, z.shape[-1]) @ _first(self.weight, seats)).reshape(*z.shape[:-1], -1)


class Heads(nn.Module):
    """A module that is trained in full, with a copy for each client."""

    def __init__(self, module: nn.Module, values: Sequence[Mapping[str, nn.Parameter]], stack: Stack) -> None:
        super().__init__()
        self._module, self._values, self._stack = [module], values, stack  # a list: not a submodule of its own

    @property
    def one(self) -> nn.Module:
        """The module in whose place this one is."""
        return self._module[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts: list[Tensor] = []
        for seat, (own, part) in enumerate(zip(self._values, x.chunk(self._stack.check(x)), strict=False)):
            self._stack.seat = seat
            parts.append(functional_call(self._module[0], dict(own), (part, *args), kwargs))
        return torch.cat(parts)


class Stack:
    """The adapters of several clients in a model's LoRA layers; made by `stacked`.

    Attributes:
        slots: the trained parameters of each client, in the order of the adapters.
        active: number of clients in the present batch; these are the first ones.
        groups: the groups of the present batch's rows, which belong to the clients in equal parts.
        seat: number of the client whose head is computed now.
    """

    def __init__(
        self,
        model: AdaptedModel,
        adapters: Sequence[AdapterState],
        train: frozenset[str],
        modules: Collection[str] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        self.active = len(adapters)
        self.groups = Groups(self.active, 0, 0)
        self.seat = 0
        self._layers: dict[str, _Layer] = {}
        pairs: list[list[Pair]] = [[] for _ in adapters]
        parameters: list[list[nn.Parameter]] = [[] for _ in adapters]
        self._kind, self._functional = model.kind, dict[str, FunctionalStack]()
        self._parts: dict[str, list[dict[str, nn.Parameter]]] = {}
        for name, layer in model.layers.items():
            device = cast("Tensor", layer.lora_A[ADAPTER].weight).device
            if not model.kind.pairs:
                trained = bool(train) and (modules is None or name in modules)
                parts = self._add_parts(name, layer, adapters, trained, frozen)
                for number, own in enumerate(parts):
                    parameters[number] += trained_parts(self._kind, own)
                continue
            mine = _Layer([a.lora[name] for a in adapters], [a.lora[name].R for a in adapters], device)
            own = train if modules is None or name in modules else frozenset[str]()
            self._layers[name] = mine
            for number in range(len(adapters)):
                a, b = mine.views(number)
                a.requires_grad_("A" in own)
                b.requires_grad_("B" in own)
                core = None if mine.cores is None else mine.cores[number]
                pairs[number].append(Pair(name, a, b, mine.scalings[number], core))
                parameters[number] += [p for p, factor in ((a, "A"), (b, "B")) if factor in own]
                if mine.cores is not None and "R" in own:
                    parameters[number].append(mine.cores[number])
            for stack, factor in ((mine.A, "A"), (mine.B, "B")):
                stack.requires_grad_(factor in own)
            for core in mine.cores or ():
                core.requires_grad_("R" in own)
        self._tensors = [{n: _own(a.tensors[n], p.device) for n, p in model.tensors.items()} for a in adapters]
        for number, tensors in enumerate(self._tensors):
            for parameter in tensors.values():
                parameter.requires_grad_(bool(train))
            parameters[number] += tensors.values() if train else ()
        self.slots = [Trainable(*each) for each in zip(pairs, parameters, strict=True)]

    def _add_parts(
        self, name: str, layer: LoraLayer, adapters: Sequence[AdapterState], trained: bool, frozen: Collection[str]
    ) -> list[dict[str, nn.Parameter]]:
        """Each client's own parts, for a kind other than LoRA."""
        one = layer.lora_A[ADAPTER]  # the module that `install` made for the last of the adapters
        assert isinstance(one, Functional)
        found = [placed(self._kind, name, layer, adapter) for adapter in adapters]
        if len({place.rank for place, _ in found}) > 1:
            raise NotStackable(f"{self._kind.name} adapters of unequal ranks cannot share a batch")
        parts = [{part: _own(value, one.weight.device) for part, value in own.items()} for _, own in found]
        for own in parts:
            for part, parameter in own.items():
                parameter.requires_grad_(has_gradient(self._kind, part, trained, frozen))
        self._functional[name] = FunctionalStack(one, parts, self)
        self._parts[name] = parts
        return parts

    def begin(self, rows: int, length: int) -> Groups:
        """Before a forward pass: the groups of the batch's rows, one for each active client.

        Args:
            rows: number of rows of the batch.
            length: number of tokens of its longest row.
        """
        self.groups = Groups(self.active, rows, length)
        return self.groups

    def check(self, x: Tensor) -> int:
        """The number of clients to which these rows belong."""
        if x.shape[0] not in self.groups.sizes:
            rows = self.groups.rows
            raise NotStackable(f"a layer got {x.shape[0]} rows of a batch of {rows}, which belong to no client")
        return self.active

    def scalings_of(self, module: str) -> Tensor:
        """Each client's scaling of a module, [clients, 1, 1]."""
        return self._layers[module].scaling

    def share_gradients(self) -> None:
        """Set the gradient of each active client's views to its part of the stacks' gradients."""
        for place, layer in enumerate(self._layers.values()):
            for number in range(self.active):
                rank = layer.ranks[number]
                pair = self.slots[number].pairs[place]
                pair.A.grad = None if layer.A.grad is None else layer.A.grad[number, :rank]
                pair.B.grad = None if layer.B.grad is None else layer.B.grad[number, :rank].T

    def drop_gradients(self) -> None:
        for layer in self._layers.values():
            layer.A.grad = layer.B.grad = None
        for slot in self.slots:
            for parameter in (*slot.parameters, *(view for pair in slot.pairs for view in (pair.A, pair.B))):
                parameter.grad = None

    def read(self, seat: int) -> AdapterState:
        """A copy of one client's present adapter, on the CPU in fp32."""
        lora = {
            name: LoraFactors(
                A=fp32_copy(layer.A[seat, : layer.ranks[seat]]),
                B=fp32_copy(layer.B[seat, : layer.ranks[seat]].T).contiguous(),
                scaling=layer.scalings[seat],
                R=fp32_copy(layer.cores[seat]) if layer.cores else None,
            )
            for name, layer in self._layers.items()
        }
        tensors = {n: fp32_copy(p) for n, p in self._tensors[seat].items()}
        for name, parts in self._parts.items():
            tensors |= read_parts(self._kind, name, parts[seat])
        return AdapterState(lora=lora, tensors=tensors)

    def modules(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The modules that replace PEFT's lora_A and lora_B of a module."""
        if name in self._functional:
            return self._functional[name], Nothing(self._functional[name].weight)
        return _Down(self._layers[name], self), _Up(self._layers[name], self)

    def heads(self, head: str, module: nn.Module) -> nn.Module:
        """The module that replaces one that is trained in full."""
        start = head + "."
        values = [
            {n.removeprefix(start): p for n, p in dense.items() if n.startswith(start)} for dense in self._tensors
        ]
        return Heads(module, values, self)


@contextmanager
def stacked(
    model: AdaptedModel,
    adapters: Sequence[AdapterState],
    train: frozenset[str],
    modules: Collection[str] | None = None,
    folds: tuple[AdapterState, ...] = (),
    *,
    frozen: Collection[str] = (),
) -> Iterator[Stack]:
    """Within the block, put several clients' adapters into the model's LoRA layers.

    Args:
        model: the model.
        adapters: the clients' adapters, of any ranks, for the same modules, all with cores or all without.
        train, modules, frozen: as in `adapted.install`.
        folds: the folds, which are one anchor for all clients.

    Raises:
        AdapterError: modules or shapes do not fit the model.
        NotStackable: the model cannot train several clients in one batch.
    """
    if isinstance(model.task.narrowed(model.model), LoraLayer):
        raise NotStackable("the output layer has an adapter, but gets only the labelled tokens and not whole rows")
    for adapter in adapters:  # for the same refusals as one at a time
        install(model, adapter, train, modules)
    install_anchor(model, folds)
    active = {name: layer.active_adapters for name, layer in model.layers.items()}
    stack = Stack(model, adapters, train, modules, frozen)
    kept = {name: (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for name, layer in model.layers.items()}
    inner = model.model.get_base_model()
    heads = {head: inner.get_submodule(head) for head in model.base.heads}
    try:
        for name, layer in model.layers.items():
            layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = stack.modules(name)
            layer.scaling[ADAPTER], layer._active_adapter = 1.0, active[name]
        for head, module in heads.items():
            inner.set_submodule(head, stack.heads(head, module))
        yield stack
    finally:
        for name, layer in model.layers.items():
            layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = kept[name]
        for head, module in heads.items():
            inner.set_submodule(head, module)


def _stacked(rows: Sequence[Tensor], device: torch.device) -> nn.Parameter:
    """A parameter [clients, r_max, d] with each client's rows [r, d], and then zeros."""
    top = max(len(part) for part in rows)
    whole = torch.zeros(len(rows), top, rows[0].shape[1], device=device)
    for part, place in zip(rows, whole, strict=True):
        place[: len(part)] = part
    return nn.Parameter(whole)


def _first(stack: Tensor, seats: int) -> Tensor:
    """The first clients' factors. If these are all, the tensor is not sliced, since a slice's gradient is a copy."""
    return stack if seats == len(stack) else stack[:seats]


def _own(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.to(device, torch.float32, copy=True))
