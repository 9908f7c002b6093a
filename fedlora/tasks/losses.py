"""Cross-entropy of a causal model's labelled tokens, without all their logits in memory at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # the label that torch's cross-entropy leaves out
_LOGITS_AT_ONCE = 2**23  # values; 32 MiB in fp32
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def inputs_of(model: nn.Module, batch: Batch) -> Batch:
    """The tokens of a batch and their mask, moved to the model's device."""
    device = next(model.parameters()).device
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def labelled_positions(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """The model's inputs, and the targets, rows and columns `[n]` of all positions that have a token to predict.

    The logits at position t predict the label at t + 1.
    """
    inputs = inputs_of(model, batch)
    labels = batch["labels"].to(inputs["input_ids"].device)
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return inputs, labels[rows, columns + 1], rows, columns


def labelled_logits(
    model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[n, vocabulary]`, targets `[n]` and rows `[n]` of all positions that have a token to predict.

    The output layer runs on these positions alone, so that prompts and padding cost nothing there.

    Args:
        model: the model with its adapter.
        batch: a batch with tokens, their mask and labels.
        adapters: PEFT's name of each row's adapter; the active adapter for all rows when left out.
    """
    inputs, targets, rows, columns = labelled_positions(model, batch)
    more = {} if adapters is None else {"adapter_names": list(adapters)}
    handle = output_layer(model).register_forward_pre_hook(lambda layer, given: (given[0][rows, columns],))
    try:
        return model(**inputs, **more).logits, targets, rows
    finally:
        handle.remove()


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy `[n]` of each labelled next token, and the number of its row in the batch `[n]`.

    If the model's logits are a frozen linear map of its last hidden state (see `look_at`), that map is computed for a
    part of the positions at a time, together with the loss's gradient by the hidden state. This saves memory, since
    logits are by far the largest tensor of a small model with a large vocabulary.
    """
    if not _plain.get(model):
        logits, targets, rows = labelled_logits(model, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none"), rows
    inputs, targets, rows, columns = labelled_positions(model, batch)
    layer = cast("nn.Linear", output_layer(model))
    with _caught(layer) as hidden:
        model(**inputs)
    return cast("Tensor", _Frozen.apply(hidden[0][rows, columns], layer.weight, layer.bias, targets)), rows


class _Frozen(torch.autograd.Function):
    """Cross-entropy of `hidden [n, d]` after a frozen output layer, computed for a part of the rows at a time."""

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
            if gradient is not None:  # (softmax - one-hot) times the layer's weight
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
    """Within the block, collect a layer's inputs and hand the layer an empty input instead."""
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
    """Find out, with two tokens, whether the model's logits are the output of a frozen linear output layer."""
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


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that computes a causal model's logits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("nn.Module", cast("PreTrainedModel", inner).get_output_embeddings())
