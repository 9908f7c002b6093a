"""The gradient of each row of a batch apart, for LoRA's factors and a head, from one forward and one backward pass.

A batch's rows are its examples. For a linear map `y = W x` and one row's inputs x [T, d_in], the row's gradient is
`g'x` with g [T, d_out] the gradient at y. A has r rows and B has r columns, so that this costs O(T d r) for each, and
the gradients of all rows take as much memory as that many adapters. A core R between them has the inputs A x, which are
computed again from x. The base has no gradient, in whatever number format its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedlora.common.errors import ConfigError
from fedlora.tasks.groups import Groups

from .adapted import AdaptedModel
from .injection import ADAPTER, Down
from .stacked import Heads, Stack

_LEVEL = "privacy.level = example"
See = Callable[[Tensor, Tensor, int], None]  # gets inputs and gradients [rows, T, d], and the number of the first row


class RowGradients:
    """What `row_gradients` records.

    Attributes:
        found: name -> the rows' gradients [rows, …], of the last backward pass: "module.A" [rows, r, d_in],
            "module.B" [rows, d_out, r] and "module.R" [rows, r, r], and the head's tensors by their names. In a batch
            of clients, r is the largest of theirs.
    """

    def __init__(self, stack: Stack | None = None) -> None:
        self.found: dict[str, Tensor] = {}
        self._stack = stack
        self._groups = Groups(0, 0, 0)

    def begin(self, rows: int, length: int) -> Groups:
        """Before a forward pass: let go of the last one's gradients.

        Args:
            rows: number of rows of the batch.
            length: number of tokens of its longest row.

        Returns:
            The groups of the batch's rows: each row is one, since it has a gradient of its own.
        """
        self.found.clear()
        self._groups = Groups(rows, rows, length)
        if self._stack is not None:
            self._stack.groups = self._groups
        return self._groups

    def by_row(self, tensor: Tensor, rows: int) -> Tensor:
        """[rows, T, d] from a layer's [rows, d], [rows, T, d] or [rows T, d], or from inputs that are shared in groups.

        Raises:
            ConfigError: the layer got other rows.
        """
        if len(tensor) * self._groups.rows // max(rows, 1) not in self._groups.sizes:
            raise ConfigError(
                f"{_LEVEL}: a layer got {len(tensor)} rows of a batch of {rows} examples, which belong "
                "to no example; name other modules with lora.target-modules, or set privacy.level = client"
            )
        return tensor.reshape(rows, -1, tensor.shape[-1])

    def add(self, name: str, gradient: Tensor, first: int = 0) -> None:
        """Add to the gradients under a name, from the row `first` on: a module may be called more than once."""
        if name not in self.found:
            self.found[name] = gradient.new_zeros(self._groups.rows, *gradient.shape[1:])
        self.found[name][first : first + len(gradient)] += gradient

    @property
    def count(self) -> int:
        """Number of rows of the batch."""
        return self._groups.rows

    @property
    def seats(self) -> int:
        """Number of clients in the batch."""
        return self._stack.active if self._stack else 1

    def place(self, head: bool) -> tuple[int, int]:
        """The first row that a layer sees now, and how many; a head is called for each client of a batch in turn."""
        if self._stack is None or not head:
            return 0, self._groups.rows
        count = self._groups.rows // self._stack.active
        return self._stack.seat * count, count


class _Tap(torch.autograd.Function):
    """The output as it is; the backward pass hands the layer's input and the gradient at its output to `see`.

    The input is saved as autograd saves it for the layer itself, so that it takes no memory of its own, and gradient
    checkpointing computes it again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(given)
        ctx.see = see
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (given,) = ctx.saved_tensors
        ctx.see(given.detach(), upstream[0].detach())
        return upstream[0], None, None


def check_rows(model: AdaptedModel) -> None:
    """Check that the gradients of single rows are defined in this model.

    Raises:
        ConfigError: they are not; the message says where.
    """
    if not model.kind.pairs:
        raise ConfigError(f"{_LEVEL} clips the gradients of A and B, which lora.kind = {model.kind.name} does not have")
    if isinstance(model.task.narrowed(model.model), LoraLayer):
        raise ConfigError(
            f"{_LEVEL}: the output layer has an adapter, but gets the labelled tokens of all rows together, so that a "
            "row's gradient cannot be told apart; leave the output layer out of lora.target-modules"
        )
    mixing = next((name for name, module in model.model.named_modules() if isinstance(module, _BatchNorm)), "")
    if mixing:
        raise ConfigError(f"{_LEVEL}: {mixing} computes one row by the others (batch norm); choose another model.name")
    for name, module in _of_heads(model):
        if type(module) not in (nn.Linear, nn.LayerNorm):
            raise ConfigError(
                f"{_LEVEL}: the gradient of single rows is known for linear layers and layer norms, and {name} of the "
                f"head is a {type(module).__name__}; choose another model.name, or privacy.level = client"
            )


@contextmanager
def row_gradients(model: AdaptedModel, stack: Stack | None = None) -> Iterator[RowGradients]:
    """Within the block, each backward pass records the gradients of single rows for all that is trained.

    Args:
        model: the model, with its adapter installed; see `check_rows`.
        stack: the clients that share the batch, if there are several.
    """
    rows = RowGradients(stack)
    handles: list[Any] = []

    def watch(module: nn.Module, see: See, head: bool = False) -> None:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                return output
            first, count = rows.place(head)
            return cast(
                "Tensor",
                _Tap.apply(output, given[0], lambda x, g: see(rows.by_row(x, count), rows.by_row(g, count), first)),
            )

        handles.append(module.register_forward_hook(hook))

    try:
        for name, layer in model.layers.items():
            down, up = cast("Down", layer.lora_A[ADAPTER]), layer.lora_B[ADAPTER]
            scalings = None if stack is None else stack.scalings_of(name)
            if down.weight.requires_grad:
                if down.core is not None:
                    raise ConfigError(f"{_LEVEL}: {name} trains A beside a core R, whose rows' gradients are not known")
                watch(down, _of_factor(rows, f"{name}.A", scalings))
            if down.core is not None and down.core.requires_grad:
                watch(down, _of_factor(rows, f"{name}.R", scalings, down.before_core))
            if cast("nn.Parameter", up.weight).requires_grad:
                watch(up, _of_factor(rows, f"{name}.B"))
        for name, module in _of_heads(model):
            watch(module, _of_head(rows, name, module), head=True)
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _of_factor(
    rows: RowGradients,
    name: str,
    scalings: Tensor | None = None,
    inputs: Callable[[Tensor], Tensor] | None = None,
) -> See:
    """What records a factor's gradients.

    Args:
        rows: where.
        name: under which name.
        scalings: those of each client [clients, 1, 1], where they are a part of the layer, as in a batch of clients.
        inputs: makes the factor's inputs of the layer's; None: these are the same.
    """

    def see(x: Tensor, g: Tensor, first: int) -> None:
        x = x if inputs is None else inputs(x)
        found = torch.bmm(g.mT.to(x.dtype), x)
        if scalings is not None:
            seats = rows.seats
            found = found * scalings[:seats].repeat_interleave(len(x) // seats, 0)
        rows.add(name, found, first)

    return see


def _of_head(rows: RowGradients, name: str, module: nn.Module) -> See:
    """What records the gradients of a head's layer."""

    def see(x: Tensor, g: Tensor, first: int) -> None:
        x, g = x.float(), g.float()
        if isinstance(module, nn.LayerNorm):
            normal = F.layer_norm(x, module.normalized_shape, eps=module.eps)
            rows.add(f"{name}.weight", (g * normal).sum(1), first)
        else:
            rows.add(f"{name}.weight", torch.bmm(g.mT, x), first)
        if module.bias is not None:
            rows.add(f"{name}.bias", g.sum(1), first)

    return see


def _of_heads(model: AdaptedModel) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the heads that have parameters of their own, each with its name in the base model."""
    inner = model.model.get_base_model()
    for head in model.base.heads:
        found = inner.get_submodule(head)
        found = found.one if isinstance(found, Heads) else found
        for name, module in found.named_modules(prefix=head):
            if any(True for _ in module.parameters(recurse=False)):
                yield name, module
