"""How the loss depends on the strength of each module's update: the derivative by a factor in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from fedlora.data import Example
from fedlora.models.adapted import AdaptedModel
from fedlora.models.injection import ADAPTER
from fedlora.models.trainable import Trainable
from fedlora.tasks.checked import mean_loss


def set_gates(model: AdaptedModel, trained: Trainable, gates: Mapping[str, float]) -> None:
    """Multiply each module's update by its gate, through the scaling of its layer."""
    for pair in trained.pairs:
        model.layers[pair.module].scaling[ADAPTER] = pair.scaling * gates[pair.module]


def gate_gradients(
    model: AdaptedModel, trained: Trainable, gates: Mapping[str, float], examples: Sequence[Example]
) -> tuple[dict[str, float], float]:
    """The derivative of the mean loss by each module's gate, and the loss.

    The output of a layer depends on its gate g and its B through g B alone, so that `g dL/dg = <dL/dB, B>`. Gates must
    not be 0. The gradients of all parameters are cleared.

    Args:
        model: the model, in which `set_gates` has set these gates.
        trained: the pairs, whose B are trained.
        gates: module -> its gate.
        examples: one batch.
    """
    model.model.eval()
    loss = mean_loss(model.task, model.model, model.task.collate(list(examples), model.base.pad_id))
    loss.backward()
    found: dict[str, float] = {}
    for pair in trained.pairs:
        slope = 0.0 if pair.B.grad is None else float((pair.B.grad * pair.B.detach()).sum())
        found[pair.module] = slope / gates[pair.module]
    for parameter in cast("nn.Module", model.model).parameters():
        parameter.grad = None
    return found, float(loss.detach())
