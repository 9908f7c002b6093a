"""Training losses of a batch's labelled positions, without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .predict import Batch, labelled_logits, labelled_positions, output_layer

_LOGITS_AT_ONCE = 2**23  # values; 32 MiB in fp32
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labelled next tokens of a batch, or over its examples (classification)."""
    return each_loss(model, batch)[0].mean()


def each_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy `[n]` of each labelled next token (or example), and its row of the batch `[n]`.

    Where the model's logits are a frozen linear map of its last hidden state (see `look_at`), a part of the positions
    goes through that map at a time, and its gradient by the hidden state is computed on the spot: logits
    are by far the largest tensor of a small model with a large vocabulary.
    """
    if batch["labels"].ndim == 1 or not _plain.get(model):
        logits, targets, rows = labelled_logits(model, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none"), rows
    inputs, targets, rows, columns = labelled_positions(model, batch)
    layer = cast("nn.Linear", output_layer(model))
    with _caught(layer) as hidden:
        model(**inputs)
    return cast("Tensor", _Frozen.apply(hidden[0][rows, columns], layer.weight, layer.bias, targets)), rows


class _Frozen(torch.autograd.Function):
    """Cross-entropy of `hidden [n, d]` through a frozen output layer, a part of the rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        losses = torch.empty(len(hidden), device=hidden.device)
        size = max(1, _LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias).float()
            total = logits.logsumexp(dim=1, keepdim=True)
            chosen = targets[part, None]
            losses[part] = (total - logits.gather(1, chosen)).squeeze(1)
            if gradient is not None:  # softmax - one-hot, through the layer
                logits.sub_(total).exp_()
                logits.scatter_add_(1, chosen, logits.new_full(chosen.shape, -1.0))
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


@contextmanager
def _caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What comes into a layer, which itself gets nothing to do."""
    seen: list[Tensor] = []

    def catch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:0],)

    handle = layer.register_forward_pre_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()


def look_at(model: nn.Module) -> None:
    """Find out, on two tokens, whether the logits are a frozen linear map of what the output layer gets."""
    layer = output_layer(model)
    if type(layer) is not nn.Linear or layer.weight.requires_grad:
        return
    made: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *given: made.append(given[-1]))
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, 2]], device=layer.weight.device)).logits
    finally:
        handle.remove()
    _plain[model] = len(made) == 1 and torch.equal(made[0].to(logits.dtype), logits)
