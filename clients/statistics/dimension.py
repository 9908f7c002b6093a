"""The intrinsic dimension of the hidden states between a model's layers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.adapters import AdapterState
from fedlora.adapters.layers import block_of
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel

from ..training.trainer import TrainResult
from .base import Statistic
from .passes import forward_passes

_KEPT = 0.9  # the largest ratios are left out, as in the paper of TwoNN


@dataclass(frozen=True)
class IntrinsicDimension(Statistic):
    """TwoNN's estimate for the states before and after each layer, over the examples of round 1.

    A state is the mean of an example's token states without padding.
    """

    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """The tensors `<layer>.dimensions` [2]: before and after the layer; others are sent back unchanged."""
        began = time.perf_counter()
        states: dict[str, list[tuple[Tensor, Tensor]]] = {}
        mask: list[Tensor] = []

        def mean(hidden: Tensor) -> Tensor:
            if not mask or hidden.shape[:2] != mask[0].shape:
                return hidden.flatten(1, -2).mean(dim=1)
            weights = mask[0].to(hidden.device, torch.float32).unsqueeze(-1)
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

        def watch(block: str):
            def hook(layer: nn.Module, given: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
                before = given[0] if given else kwargs.get("hidden_states")
                after = output[0] if isinstance(output, tuple) else output
                assert isinstance(before, Tensor)
                assert isinstance(after, Tensor)
                states.setdefault(block, []).append((mean(before.float()), mean(after.float())))

            return hook

        def masked(batch: dict[str, Tensor]) -> None:
            mask[:] = [batch["attention_mask"]] if "attention_mask" in batch else []

        inner = model.model.get_base_model()
        blocks = sorted({block for name in model.layers if (block := block_of(name))})
        handles = [inner.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in blocks]
        try:
            loss, tokens, _ = forward_passes(model, examples, config, seed, masked)
        finally:
            for handle in handles:
                handle.remove()
        found = {
            f"{block}.dimensions": torch.tensor([two_nn(torch.cat(side)) for side in zip(*pairs, strict=True)])
            for block, pairs in states.items()
        }
        result = TrainResult(loss, loss, steps=0, tokens=tokens, seconds=time.perf_counter() - began)
        return AdapterState(lora=asked.lora, tensors={**asked.tensors, **found}), result


def two_nn(points: Tensor) -> float:
    """The intrinsic dimension of points [n, d] from the distances to their two nearest neighbours.

    Facco et al. 2017, "Estimating the intrinsic dimension of datasets by a minimal neighborhood information",
    https://arxiv.org/abs/1803.06992: the slope through the origin of `-log(1 - F(mu))` on `log mu`, where mu is the
    ratio of the second distance to the first, and F its empirical distribution, without the largest tenth. Points that
    are equal count once. With fewer than 3 different points, it is 0.
    """
    different = torch.unique(points.double(), dim=0)
    if len(different) < 3:
        return 0.0
    near = torch.cdist(different, different).topk(3, dim=1, largest=False).values[:, 1:]
    ratios = (near[:, 1] / near[:, 0].clamp(min=1e-300)).log().sort().values
    kept = ratios[: max(1, int(_KEPT * len(ratios)))]
    height = -torch.log1p(-torch.arange(1, len(kept) + 1, dtype=torch.float64) / len(ratios)).to(kept)
    below = float(kept @ kept)
    return float(kept @ height) / below if below else 0.0
