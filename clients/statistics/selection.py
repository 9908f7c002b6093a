"""Which layers or modules are worth training: gates that are trained beside an adapter, on other examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from fedlora.adapters import AdapterState
from fedlora.adapters.layers import block_of
from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.data import Example, LazyExamples, batch_at
from fedlora.models import adapted
from fedlora.models.adapted import AdaptedModel

from ..training.schedule import hash_seed, steps_per_round
from ..training.trainer import LocalSteps, TrainResult, step_gradients
from .base import Statistic
from .gates import gate_gradients, set_gates

_RATE, _VALIDATIONS = 1e-2, 8  # Adam's rate and the number of its batches for each step, as in Flexora's code


@dataclass(frozen=True)
class Selection(Statistic):
    """`alpha` of each group of modules, whose updates are multiplied by `G softmax(alpha)_g`, G the number of groups.

    A group is a module or a layer, whichever the server asks for. The steps of round 1 train the adapter on every
    second example, with the gates as constants. After each step, 8 batches of the other examples step alpha by Adam
    (first order: how the adapter depends on alpha is left out).
    """

    def measure(
        self, model: AdaptedModel, asked: AdapterState, examples: LazyExamples, config: TrainConfig, seed: int
    ) -> tuple[AdapterState, TrainResult]:
        """The tensors `<group>.alpha` [1]; others are sent back unchanged.

        Raises:
            ConfigError: the client has fewer than 2 examples.
        """
        if len(examples) < 2:
            raise ConfigError(f"choosing layers needs 2 examples of each client, this one has {len(examples)}")
        began = time.perf_counter()
        group_of = {name: name if f"{name}.alpha" in asked.tensors else block_of(name) or name for name in model.layers}
        groups = sorted({*group_of.values()})
        alpha = torch.zeros(len(groups), dtype=torch.float64, requires_grad=True)
        method = torch.optim.Adam([alpha], lr=_RATE)
        start = AdapterState(lora=asked.lora, tensors={name: asked.tensors[name] for name in model.tensors})
        trained = adapted.install(model, start, ("A", "B"))
        torch.manual_seed(hash_seed(seed, 0))  # dropout

        def gates() -> dict[str, float]:
            """Those of the present alpha, by module, set in the model."""
            shares = dict(zip(groups, (len(groups) * alpha.detach().softmax(dim=0)).tolist(), strict=True))
            found = {name: shares[group] for name, group in group_of.items()}
            set_gates(model, trained, found)
            return found

        training, other = _Part(examples, 0), _Part(examples, 1)
        local = LocalSteps(trained, training, config, number=1, rounds=1, seed=seed, vary=model.task.augmented)
        for step in range(steps_per_round(config, len(training))):
            gates()
            model.model.train()
            local.take(step, step_gradients(model.task, model.model, local, step, model.base.pad_id))
            for check in range(_VALIDATIONS):
                batch = batch_at(len(other), config.batch_size, step * _VALIDATIONS + check, seed)
                slopes, _ = gate_gradients(model, trained, gates(), [other[place] for place in batch])
                summed = torch.tensor([sum(s for m, s in slopes.items() if group_of[m] == g) for g in groups]).double()
                (alpha.grad,) = torch.autograd.grad(len(groups) * alpha.softmax(dim=0), alpha, summed)
                method.step()
        found = {
            f"{group}.alpha": value.reshape(1) for group, value in zip(groups, alpha.detach().float(), strict=True)
        }
        result = local.result(time.perf_counter() - began)
        return AdapterState(lora=asked.lora, tensors={**asked.tensors, **found}), result


class _Part(Sequence[Example]):
    """Every second example, from the first or the second on."""

    def __init__(self, examples: LazyExamples, first: int) -> None:
        self._examples, self._places = examples, range(first, len(examples), 2)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._examples[place] for place in self._places[index]]
        return self._examples[self._places[index]]
