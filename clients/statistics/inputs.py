"""Sums and sketches of what goes into each adapted layer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.sketches import sketcher
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples
from fedlora.models.adapted import AdaptedModel

from ..training.trainer import TrainResult
from .base import Statistic
from .passes import forward_passes, seen


@dataclass(frozen=True)
class Inputs(Statistic):
    """For the inputs x [d_in] of each adapted layer, one per token: `sum x x' O`, `sum x`, `sum x^2`, their number.

    O [d_in, width] is a matrix of random signs (`fedlora.adapters.sketches`). The sums are over the examples of round
    1, without padding, and are divided by the number of these examples, so that the mean over clients counts each
    client by its examples. Nothing but forward passes is needed, and no weight is read.
    """

    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """The tensors `<module>.sketch` [d_in, width] and `<module>.sums` [2 d_in + 1]; others are unchanged."""
        began = time.perf_counter()
        device = model.base.device
        sketches = {name: torch.zeros_like(asked.tensors[f"{name}.sketch"], device=device) for name in model.layers}
        sums = {name: torch.zeros_like(asked.tensors[f"{name}.sums"], device=device) for name in model.layers}
        omega = {s.shape: sketcher(*s.shape).to(device) for s in sketches.values()}
        last: list[tuple[Tensor, dict[torch.Size, Tensor], Tensor]] = []  # layers that share an input share its sketch

        def see(name: str, x: Tensor, rows: Tensor) -> None:
            shape = sketches[name].shape
            if not last or last[0][0] is not x:
                flat = rows.float()
                count = torch.tensor([len(flat)], device=device)
                last[:] = [(x, {}, torch.cat([flat.sum(dim=0), flat.square().sum(dim=0), count]))]
            _, made, summed = last[0]
            if shape not in made:
                flat = rows.float()
                made[shape] = flat.T @ (flat @ omega[shape])
            sketches[name] += made[shape]
            sums[name] += summed

        with seen(model, see) as masked:
            loss, tokens, number = forward_passes(model, examples, config, seed, masked)
        found = {f"{name}.sketch": sketch.cpu() / number for name, sketch in sketches.items()}
        found |= {f"{name}.sums": summed.cpu() / number for name, summed in sums.items()}
        result = TrainResult(loss, loss, steps=0, tokens=tokens, seconds=time.perf_counter() - began)
        return AdapterState(lora=asked.lora, tensors={**asked.tensors, **found}), result
