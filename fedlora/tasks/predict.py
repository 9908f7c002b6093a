"""What the model in place predicts, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import Example, collate, eval_batches
from fedlora.data.examples import IGNORED

from .scores import Predictions, scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]


def labelled_logits(
    model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[n, vocabulary or classes]`, targets `[n]` and rows of the batch `[n]` where there is a label to predict.

    For a causal model, the logits at position t predict the label at t + 1. The output layer runs on these positions
    alone: prompts and padding cost nothing there.

    Args:
        model: with its adapter in place.
        batch: as `collate` makes it.
        adapters: the adapter of each row, by PEFT's names; the active one for all when left out.
    """
    inputs, targets, rows, columns = labelled_positions(model, batch)
    more = {} if adapters is None else {"adapter_names": list(adapters)}
    if batch["labels"].ndim == 1:
        return model(**inputs, **more).logits, targets, rows
    handle = output_layer(model).register_forward_pre_hook(lambda layer, given: (given[0][rows, columns],))
    try:
        return model(**inputs, **more).logits, targets, rows
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


def predict(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """What the model says at every labelled position of a data set; one batch's logits are held at a time.

    Args:
        model: with its adapter in place.
        examples: at least one.
        batch_size: examples per forward pass.
        pad_id: fills the batches' right side.
        on_batch: called after each batch with (examples done, examples).
    """
    kept = list(examples)
    classes = 0
    parts: list[tuple[Tensor, ...]] = []
    done, was_training = 0, model.training
    model.eval()
    with torch.no_grad():
        for chosen in eval_batches(kept, batch_size):
            logits, targets, rows = labelled_logits(model, collate([kept[index] for index in chosen], pad_id))
            parts.append((torch.tensor(chosen, device=rows.device)[rows], targets, *read_logits(logits, targets)))
            classes = 0 if isinstance(kept[0].labels, list) else logits.shape[-1]
            done += len(chosen)
            on_batch(done, len(kept))
    model.train(was_training)
    return joined(parts, classes)


def read_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable class of each row, its probability, and the target's loss (nats), each `[n]`.

    Args:
        logits: `[n, classes]`, of any float type.
        targets: int64 `[n]`.
    """
    wide = logits.float()
    losses = F.cross_entropy(wide, targets, reduction="none")
    top, predicted = wide.max(dim=-1)
    # log p(predicted) = log p(target) + the difference of their logits: no second sum over the vocabulary
    own = wide.gather(-1, targets[:, None])[:, 0]
    return predicted, (top - own - losses).exp().clamp(max=1.0), losses


def joined(parts: Sequence[tuple[Tensor, ...]], classes: int) -> Predictions:
    """Batches of (rows, targets, predicted, probabilities, losses) as one, on the CPU."""
    columns = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Predictions(*columns, classes=classes)


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """The `scores` of what the model predicts for a data set; see `predict` for the arguments."""
    return scores(predict(model, examples, batch_size, pad_id, on_batch))


def output_layer(model: nn.Module) -> nn.Module:
    """What makes a causal model's logits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("nn.Module", cast("PreTrainedModel", inner).get_output_embeddings())
