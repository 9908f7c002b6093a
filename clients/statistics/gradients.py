"""The leading directions of the loss's gradient by each adapted weight, without storing that gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.adapters import AdapterState, LoraFactors, first_ranks, leading, lowrank, pad, stack
from fedlora.config import TrainConfig
from fedlora.data import Example, LazyExamples, batch_at
from fedlora.models.adapted import AdaptedModel
from fedlora.models.per_example import RowGradients
from fedlora.tasks.base import Task
from fedlora.tasks.checked import mean_loss, row_losses
from fedlora.tasks.groups import grouped

from ..training.private import RowPrivacy
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

    def measure_with_noise(
        self,
        model: AdaptedModel,
        asked: AdapterState,
        examples: LazyExamples,
        config: TrainConfig,
        *,
        privacy: RowPrivacy,
        releases: int,
    ) -> tuple[AdapterState, TrainResult]:
        """The best approximation of each module's noised gradient; see `noised_gradients`."""
        began = time.perf_counter()
        found = noised_gradients(model, examples, config.batch_size, privacy, releases)
        lora: dict[str, LoraFactors] = {}
        for name, factors in asked.lora.items():
            some = leading(lowrank.of_matrix(found[name], factors.rank), factors.rank)
            whole = pad(first_ranks(some, min(some.rank, factors.rank), 1.0), factors.rank)
            lora[name] = LoraFactors(A=whole.A.float().cpu(), B=whole.B.float().cpu(), scaling=1.0)
        result = TrainResult(0.0, 0.0, steps=0, tokens=0, seconds=time.perf_counter() - began)
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

    def add(name: str, gradient: Tensor, given: Tensor) -> None:
        D, X = gradient.flatten(0, -2), given.flatten(0, -2)
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
    with _watched(layers, add):
        for batch, count in zip(batches, labelled, strict=True):
            loss = mean_loss(task, model, batch) * (count / sum(labelled))
            loss.backward()
            total += float(loss.detach())
    factors: dict[str, LoraFactors] = {}
    for name, layer in layers.items():
        d_out, d_in = cast("tuple[int, int]", (layer.out_features, layer.in_features))
        some = found.get(name, LoraFactors(A=torch.zeros(0, d_in), B=torch.zeros(d_out, 0), scaling=1.0))
        whole = pad(first_ranks(some, min(some.rank, ranks[name]), 1.0), ranks[name])
        factors[name] = LoraFactors(A=whole.A.cpu(), B=whole.B.cpu(), scaling=1.0)
    tokens = sum(int(task.tokens(batch).sum()) for batch in batches)
    return factors, TrainResult(total, total, steps=0, tokens=tokens, seconds=time.perf_counter() - began)


def noised_gradients(
    model: AdaptedModel, examples: Sequence[Example], most: int, privacy: RowPrivacy, releases: int
) -> dict[str, Tensor]:
    """The mean gradient by each adapted weight, with noise, fp32 [d_out, d_in] by module.

    Each release is that of a step of DP-SGD (see `RowPrivacy`), with the whole weights in the place of A and B: a row's
    gradient is clipped over all modules together, and all entries have noise. The mean is over all releases, and
    whatever is computed from it costs nothing more. The norm of a row's gradient `G = D' X`, D [T, d_out] and
    X [T, d_in], is found without G: `|G|^2 = sum_{t,u} (D D')_tu (X X')_tu`.
    Memory: one fp32 matrix as large as each adapted weight, and the inputs and gradients of one batch.

    Args:
        model: the model, with an adapter that adds nothing.
        examples: the client's own examples.
        most: largest number of rows of a forward pass.
        privacy: how rows are drawn, clipped and noised.
        releases: number of sums.
    """
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in model.layers.items()}
    device = next(model.model.parameters()).device
    sums = {name: torch.zeros(cast("tuple[int, int]", shape), device=device) for name, shape in shapes.items()}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    rows = RowGradients()

    def add(name: str, gradient: Tensor, given: Tensor) -> None:
        count = rows.count
        seen.setdefault(name, []).append((rows.by_row(gradient, count).float(), rows.by_row(given, count).float()))

    model.model.train()
    with _watched(model.layers, add):
        for part in (part for _ in range(releases) for part in privacy.drawn(examples, most)):
            seen.clear()
            batch = model.task.collate(part, model.base.pad_id)
            with grouped(rows.begin(len(part), int(model.task.tokens(batch).max()))):
                each = row_losses(model.task, model.model, batch, len(part))
            each.sum().backward()
            whole = {
                name: tuple(torch.cat(side, 1) for side in zip(*calls, strict=True)) for name, calls in seen.items()
            }
            squares = [(torch.bmm(D, D.mT) * torch.bmm(X, X.mT)).double().sum((1, 2)) for D, X in whole.values()]
            norms = torch.stack(squares).sum(0).clamp(min=0).sqrt()
            finite = torch.isfinite(norms)
            factors = torch.where(finite, (privacy.clip / norms.clamp(min=1e-300)).clamp(max=1.0), 0.0).float()
            for name, (D, X) in whole.items():
                clipped = torch.where(finite[:, None, None], D, 0.0) * factors[:, None, None]
                sums[name] += clipped.flatten(0, 1).T @ torch.where(finite[:, None, None], X, 0.0).flatten(0, 1)
    deviation = privacy.noise_multiplier * privacy.clip * releases**0.5
    if deviation:
        for total in sums.values():
            total.add_(torch.from_numpy(privacy.noise.normal(tuple(total.shape), deviation)).to(total))
    return {name: total / (privacy.expected * releases) for name, total in sums.items()}


@contextmanager
def _watched(layers: Mapping[str, LoraLayer], add: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block, each backward pass calls `add` with a layer's name, gradient at its output, and input."""
    handles = [cast("nn.Module", layer).register_forward_hook(_watch(name, add)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, add: Callable[[str, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    """A forward hook that passes the gradient at a layer's output, and its input, to `add`."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all layers below are frozen; a copy, since a leaf must not be changed in place
            output = output.detach().requires_grad_().clone()
        x = inputs[0].detach()
        output.register_hook(lambda gradient: add(name, gradient, x))
        return output

    return hook
