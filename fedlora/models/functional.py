"""Puts adapters of kinds other than LoRA into PEFT's LoRA layers, for one client or for several in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fedlora.adapters.kinds.base import MASK, OUTPUT, WEIGHT, AdapterKind, Parts, Place

from .weights import weight_of

_COPIES: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()  # constant -> its copies
_ROWWISE = (OUTPUT, MASK)  # of what a kind sees, that which belongs to rows of x


class Functional(nn.Module):
    """x -> kind.forward(x). This module takes the place of lora_A, and `Nothing` that of lora_B.

    PEFT's layer casts its input to the dtype of `weight`, applies dropout, and adds the result to the base's output.
    """

    def __init__(
        self,
        kind: AdapterKind,
        place: Place,
        parts: Mapping[str, nn.Parameter],
        constants: Parts | None = None,
        sight: Sight | Mask | None = None,
    ) -> None:
        """Args:
        kind: of the adapter.
        place: the layer.
        parts: the trained parts.
        constants: the kind's constants at this place; made anew when left out.
        sight: of the layer or of the batch's mask, for kinds that see one of them.
        """
        super().__init__()
        self.kind, self.place, self.sight = kind, place, sight
        self.parts = nn.ParameterDict(dict(parts))
        for name, constant in (kind.constants(place) if constants is None else constants).items():
            self.register_buffer(f"constant_{name}", _shared(constant, self.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        return next(iter(self.parts.values()))

    @property
    def constants(self) -> dict[str, Tensor]:
        """The kind's tensors that are never trained, by name."""
        return {name.removeprefix("constant_"): value for name, value in self.named_buffers()}

    def forward(self, x: Tensor) -> Tensor:
        seen = self.sight.take(x) if self.sight else {}
        return self.kind.forward(x, dict(self.parts), {**self.constants, **seen}, self.place)


class Sight:
    """What a kind sees of its layer: the frozen weight, and the layer's own output for the present input."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer, self._output = layer, dict[str, Tensor]()
        self._base: nn.Module = layer.get_base_layer()
        self._base.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._output[OUTPUT] = output

    @property
    def weight(self) -> Tensor:
        """The frozen weight, dequantized, [d_out, d_in], in fp32."""
        return weight_of(self._layer).float()

    def take(self, x: Tensor) -> dict[str, Tensor]:
        """The weight, and the output of the forward pass that is under way, without its bias; once for a pass."""
        output = self._output.pop(OUTPUT).to(x.dtype)
        bias = self._base.bias
        seen = output if bias is None else output - bias.to(x.dtype)  # pyright: ignore[reportCallIssue, reportOperatorIssue]
        return {WEIGHT: self.weight.to(x.device), OUTPUT: seen}


class Mask:
    """What a kind sees of the present batch: which positions are tokens, as the model's attention mask says."""

    def __init__(self, model: nn.Module) -> None:
        self._mask: Tensor | None = None
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: object, given: Mapping[str, Any]) -> None:
        self._mask = given.get("attention_mask")

    def take(self, x: Tensor) -> dict[str, Tensor]:
        """The mask in the shape of x's positions. It is all ones where x does not have all positions of the batch."""
        shape, mask = x.shape[:-1], self._mask
        fits = mask is not None and mask.numel() == math.prod(shape)
        return {MASK: mask.reshape(shape).to(x) if mask is not None and fits else x.new_ones(shape)}


def _shared(constant: Tensor, device: torch.device) -> Tensor:
    """A constant on a device. Layers that a kind gives one tensor share one copy, as long as the kind keeps it."""
    if constant.device == device:
        return constant
    copies = _COPIES.setdefault(constant, {})
    if device not in copies:
        copies[device] = constant.to(device)
    return copies[device]


class Nothing(nn.Module):
    """x -> x, in the place of lora_B."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x


class Rows(Protocol):
    """Knows to which clients a batch's rows belong: `stacked.Stack`."""

    def check(self, x: Tensor) -> int:
        """The number of clients to which these rows belong."""
        ...


class FunctionalStack(nn.Module):
    """Several clients' parts beside one layer. One `torch.vmap` sends each client's rows through its own parts."""

    def __init__(self, one: Functional, parts: Sequence[Mapping[str, nn.Parameter]], rows: Rows) -> None:
        super().__init__()
        self._one, self._parts, self._rows = [one], parts, rows  # a list: not a submodule of its own

    @property
    def weight(self) -> Tensor:
        return next(iter(self._parts[0].values()))

    def forward(self, x: Tensor) -> Tensor:
        one, clients = self._one[0], self._rows.check(x)
        stacks = {name: torch.stack([own[name] for own in self._parts[:clients]]) for name in self._parts[0]}

        seen = one.sight.take(x) if one.sight else {}
        shared = {name: value for name, value in {**one.constants, **seen}.items() if name not in _ROWWISE}
        rowwise = {name: value.unflatten(0, (clients, -1)) for name, value in seen.items() if name in _ROWWISE}

        def of_one(rows: Tensor, own: dict[str, Tensor], of_rows: dict[str, Tensor]) -> Tensor:
            return one.kind.forward(rows, own, {**shared, **of_rows}, one.place)

        together = torch.vmap(of_one)(x.unflatten(0, (clients, -1)), stacks, rowwise)
        return together.flatten(0, 1)
