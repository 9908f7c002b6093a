"""The leading directions of the loss's gradient by each adapted weight, without storing that gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.adapters import AdapterState, LoraFactors, first_ranks, leading, lowrank, pad, stack
from fedlora.config import TrainConfig
from fedlora.data import Example, LazyExamples, batch_at
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.base import Task
from fedlora.tasks.checked import mean_loss

from ..training.schedule import hash_seed
from ..training.trainer import TrainResult
from .base import Statistic

# From batch to batch, this many times the wanted number of directions is kept, as in LoRA-GA
# (https://arxiv.org/abs/2407.05000).
_SPARE = 4


@dataclass(frozen=True)
class LeadingDirections(Statistic):
    """The best approximation of each module's gradient, at the rank that the server asks for."""

    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """`leading_directions` of all modules; tensors trained in full are sent back unchanged."""
        ranks = {name: factors.rank for name, factors in asked.lora.items()}
        lora, result = leading_directions(
            model.task,
            model.model,
            model.layers,
            ranks,
            examples,
            config=config,
            pad_id=model.base.pad_id,
            seed=seed,
        )
        return AdapterState(lora=lora, tensors=asked.tensors), result


def leading_directions(
    task: Task,
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    ranks: Mapping[str, int],
    examples: Sequence[Example],
    *,
    config: TrainConfig,
    pad_id: int,
    seed: int,
) -> tuple[dict[str, LoraFactors], TrainResult]:
    """The best approximations, of the given ranks, of the gradient `G = dL/dW = D' X` for the weight W of each layer.

    D [tokens, d_out] is the loss's gradient by the layer's output, and X [tokens, d_in] is the layer's input. Hooks
    collect both. W itself is not read, so that it may be quantized, and no gradient as large as W is stored. The loss
    is that of the first optimizer step of round 1: `train.accumulate` batches of `train.batch_size` examples.

    Args:
        task: defines the loss.
        model: the model; nothing in it needs a gradient of its own.
        layers: module name -> layer.
        ranks: module name -> number of directions.
        examples: the client's own examples.
        config: the run's section train.
        pad_id: token that fills up shorter rows of a batch on the right.
        seed: seed of this client's order of examples and of dropout.

    Returns:
        Module name -> factors of scaling 1, `B = U sqrt(S)` [d_out, rank] and `A = sqrt(S) V'` [rank, d_in], with zeros
        if G has fewer directions; and a result with the loss and no steps.
    """
    began = time.perf_counter()
    found: dict[str, LoraFactors] = {}

    def add(name: str, D: Tensor, X: Tensor) -> None:
        alive = D.any(dim=1)  # padding has no gradient
        parts = [LoraFactors(A=X[alive].float(), B=D[alive].float().T, scaling=1.0)]
        summed = stack([found[name], *parts] if name in found else parts)
        keep = _SPARE * ranks[name]
        if summed.rank:
            found[name] = leading(lowrank.product_svd(summed.B, summed.A, keep), keep)

    torch.manual_seed(hash_seed(seed, 0))  # dropout
    model.train()
    chosen = [batch_at(len(examples), config.batch_size, index, seed) for index in range(config.accumulate)]
    batches = [task.collate([examples[i] for i in batch], pad_id) for batch in chosen]
    labelled = [int(task.counts(batch).sum()) for batch in batches]
    total = 0.0
    handles = [cast("nn.Module", layer).register_forward_hook(_watch(name, add)) for name, layer in layers.items()]
    try:
        for batch, count in zip(batches, labelled, strict=True):
            loss = mean_loss(task, model, batch) * (count / sum(labelled))
            loss.backward()
            total += float(loss.detach())
    finally:
        for handle in handles:
            handle.remove()
    factors: dict[str, LoraFactors] = {}
    for name, layer in layers.items():
        d_out, d_in = cast("tuple[int, int]", (layer.out_features, layer.in_features))
        some = found.get(name, LoraFactors(A=torch.zeros(0, d_in), B=torch.zeros(d_out, 0), scaling=1.0))
        whole = pad(first_ranks(some, min(some.rank, ranks[name]), 1.0), ranks[name])
        factors[name] = LoraFactors(A=whole.A.cpu(), B=whole.B.cpu(), scaling=1.0)
    tokens = sum(int(task.tokens(batch).sum()) for batch in batches)
    return factors, TrainResult(total, total, steps=0, tokens=tokens, seconds=time.perf_counter() - began)


def _watch(name: str, add: Callable[[str, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    """A forward hook that passes a layer's inputs and output gradients to `add`, with one row per token."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all layers below are frozen; a copy, since a leaf must not be changed in place
            output = output.detach().requires_grad_().clone()
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: add(name, gradient.flatten(0, -2), x))
        return output

    return hook
