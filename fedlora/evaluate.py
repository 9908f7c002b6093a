"""Loss, perplexity and accuracy of the model in place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import Example, collate, eval_batches

Batch = dict[str, Tensor]


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labelled next tokens of a batch, or over its examples (classification)."""
    logits, targets = labelled_logits(model, batch)
    return F.cross_entropy(logits.float(), targets)


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[n, vocabulary or classes]` and targets `[n]` where there is a label to predict.

    For a causal model, the logits at position t predict the label at t + 1. Where the model allows it, the
    output layer runs only on positions at which some row has a label: prompts and padding cost nothing there.
    """
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    labels = batch["labels"].to(device)
    if labels.ndim == 1:
        return model(**inputs).logits, labels
    targets = labels[:, 1:]
    columns = (targets != -100).any(dim=0).nonzero().squeeze(1)
    if _takes_logits_to_keep(type(_innermost(model))):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    targets = targets[:, columns]
    keep = targets != -100
    return logits[keep], targets[keep]


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
            logits, targets = labelled_logits(model, collate(chosen, pad_id))
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


def _innermost(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_base_model", None)
    return get() if get else model


@lru_cache
def _takes_logits_to_keep(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
