"""Forward passes over a client's examples of round 1, and what goes into layers during them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.base import Batch
from fedlora.tasks.checked import each_loss

from ..training.schedule import examples_of

Masked = Callable[[Batch], None]


def forward_passes(
    model: AdaptedModel, examples: LazyExamples, config: TrainConfig, seed: int, before: Masked = lambda batch: None
) -> tuple[float, int, int]:
    """Send the examples that the client will train on in round 1 through the model, without dropout and gradients.

    Args:
        model: the model.
        examples: the client's own examples.
        config: the run's section train.
        seed: seed of this client's order of examples.
        before: called with each batch before it goes through the model.

    Returns:
        The mean loss, the number of tokens, and the number of examples.
    """
    chosen = examples_of(config, len(examples), 1, seed)
    losses, count, tokens = 0.0, 0, 0
    model.model.eval()
    with torch.no_grad():
        for begin in range(0, len(chosen), config.batch_size):
            part = [examples[place] for place in chosen[begin : begin + config.batch_size]]
            batch = model.task.collate(part, model.base.pad_id)
            before(batch)
            each, _ = each_loss(model.task, model.model, batch)
            losses, count = losses + float(each.sum()), count + len(each)
            tokens += int(model.task.tokens(batch).sum())
    return losses / max(1, count), tokens, len(chosen)


@contextmanager
def seen(model: AdaptedModel, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[Masked]:
    """Within the block, call `see(module, x, rows)` for each adapted layer that is called.

    x is the layer's input as it came, and rows [n, d_in] are its vectors without those of padding. The block gets a
    function that must be called with each batch before it goes through the model.
    """
    mask: list[Tensor] = []

    def masked(batch: Batch) -> None:
        mask[:] = [batch["attention_mask"].bool()] if "attention_mask" in batch else []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            whole = mask and x.shape[:-1] == mask[0].shape
            see(name, inputs[0], x[mask[0].to(x.device)] if whole else x.flatten(0, -2))

        return hook

    handles = [cast("nn.Module", layer).register_forward_pre_hook(watch(name)) for name, layer in model.layers.items()]
    try:
        yield masked
    finally:
        for handle in handles:
            handle.remove()
