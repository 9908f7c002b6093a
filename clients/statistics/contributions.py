"""What each module's update contributes to a lower loss: integrated gradients from the base model to a trained one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedlora.adapters import AdapterState
from fedlora.config import TrainConfig
from fedlora.data import LazyExamples, batch_at
from fedlora.models import adapted
from fedlora.models.adapted import AdaptedModel

from ..training import trainer
from ..training.trainer import TrainResult
from .base import Statistic
from .gates import gate_gradients, set_gates

_POINTS = 8  # of the midpoint rule; the sum of all contributions then differs little from the change of the loss


@dataclass(frozen=True)
class Contributions(Statistic):
    """`-integral_0^1 dL/dg_m dt` along W + t dW, for each module m, where dW is trained as in round 1.

    g_m is the strength of the module's own update; at t, all have the value t. The contributions of all modules add up
    to L(W) - L(W + dW), up to the error of the midpoint rule. The loss is that of the first batch of round 1.
    """

    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """The tensors `<module>.contribution` [1]; others are sent back unchanged."""
        start = AdapterState(lora=asked.lora, tensors={name: asked.tensors[name] for name in model.tensors})
        trained = adapted.install(model, start, ("A", "B"))
        result = trainer.train(
            model.task,
            model.model,
            trained,
            examples,
            config,
            pad_id=model.base.pad_id,
            number=1,
            rounds=1,
            seed=seed,
        )
        batch = [examples[place] for place in batch_at(len(examples), config.batch_size, 0, seed)]
        totals = dict.fromkeys(model.layers, 0.0)
        for point in range(_POINTS):
            gates = dict.fromkeys(model.layers, (point + 0.5) / _POINTS)
            set_gates(model, trained, gates)
            slopes, _ = gate_gradients(model, trained, gates, batch)
            totals = {module: total - slopes[module] / _POINTS for module, total in totals.items()}
        found = {f"{module}.contribution": torch.tensor([total]) for module, total in totals.items()}
        return AdapterState(lora=asked.lora, tensors={**asked.tensors, **found}), result
