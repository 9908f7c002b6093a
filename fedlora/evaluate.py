"""Loss, perplexity and accuracy of the model in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import Example, collate, eval_batches
from fedlora.data.forms import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[n, vocabulary or classes]`, targets `[n]` and rows of the batch `[n]` where there is a label to predict.

    For a causal model, the logits at position t predict the label at t + 1. The output layer runs on these positions
    alone: prompts and padding cost nothing there.
    """
    inputs, targets, rows, columns = labelled_positions(model, batch)
    if batch["labels"].ndim == 1:
        return model(**inputs).logits, targets, rows
    handle = output_layer(model).register_forward_pre_hook(lambda layer, given: (given[0][rows, columns],))
    try:
        return model(**inputs).logits, targets, rows
    finally:
        handle.remove()


def labelled_positions(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """The model's inputs, and where there is a label to predict: targets, rows and columns, each `[n]`."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    labels = batch["labels"].to(device)
    if labels.ndim == 1:
        rows = torch.arange(len(labels), device=device)
        return inputs, labels, rows, torch.zeros_like(rows)
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return inputs, labels[rows, columns + 1], rows, columns


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Means over all labelled tokens (or examples) of a data set.

    Args:
        model: with its adapter in place.
        examples: at least one.
        batch_size: examples per forward pass.
        pad_id: fills the batches' right side.
        on_batch: called after each batch with (examples done, examples).

    Returns:
        `loss` (nats), `accuracy` (of the next token, or of the class), and `perplexity` for a causal model.
    """
    loss, correct, count, done = 0.0, 0, 0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for chosen in eval_batches(examples, batch_size):
            logits, targets, _ = labelled_logits(model, collate(chosen, pad_id))
            loss += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            correct += int((logits.argmax(dim=-1) == targets).sum())
            count += len(targets)
            done += len(chosen)
            on_batch(done, len(examples))
    model.train(was_training)
    result = {"loss": loss / count, "accuracy": correct / count}
    if not isinstance(examples[0].labels, int):
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
    return result


def output_layer(model: nn.Module) -> nn.Module:
    """What makes a causal model's logits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("nn.Module", cast("PreTrainedModel", inner).get_output_embeddings())
