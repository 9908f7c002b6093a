"""Puts adapters of kinds other than LoRA into PEFT's LoRA layers, for one client or for several in one batch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fedlora.adapters.kinds.base import AdapterKind, Place

_COPIES: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()  # constant -> its copies


class Functional(nn.Module):
    """x -> kind.forward(x). This module takes the place of lora_A, and `Nothing` that of lora_B.

    PEFT's layer casts its input to the dtype of `weight`, applies dropout, and adds the result to the base's output.
    """

    def __init__(self, kind: AdapterKind, place: Place, parts: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.kind, self.place = kind, place
        self.parts = nn.ParameterDict(dict(parts))
        for name, constant in kind.constants(place).items():
            self.register_buffer(f"constant_{name}", _shared(constant, self.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        return next(iter(self.parts.values()))

    @property
    def constants(self) -> dict[str, Tensor]:
        """The kind's tensors that are never trained, by name."""
        return {name.removeprefix("constant_"): value for name, value in self.named_buffers()}

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.forward(x, dict(self.parts), self.constants, self.place)


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

        def of_one(rows: Tensor, own: dict[str, Tensor]) -> Tensor:
            return one.kind.forward(rows, own, one.constants, one.place)

        together = torch.vmap(of_one)(x.unflatten(0, (clients, -1)), stacks)
        return together.flatten(0, 1)
