"""Evaluates several adapters of one base model in one pass: each batch's rows are repeated, once for every adapter.

This uses PEFT's mixed batches: the base model's layers get all rows together, and each adapter only its own rows.
S-LoRA does the same (Sheng et al. 2023, https://arxiv.org/abs/2311.03285); its kernels for unequal ranks are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fedlora.data import Example, eval_batches
from fedlora.tasks.base import Task
from fedlora.tasks.checked import check_predictions
from fedlora.tasks.predict import predict
from fedlora.tasks.scores import Predictions

# The name of the base model without an adapter, among the names of adapters.
BASE = "__base__"
_MIXABLE_HEADS = (nn.Linear, nn.Embedding)
_log = logging.getLogger("fedlora")


def predict_many(
    task: Task,
    model: PeftModel,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Predictions]:
    """The predictions of each adapter for a data set, in one pass; they are the same as those of `predict`.

    If PEFT cannot mix batches in this model, the adapters are evaluated one after another, which is logged.

    Args:
        task: the task to which the examples belong.
        model: the model with all adapters loaded, of any ranks and not merged.
        names: names of the adapters, each once; `BASE` stands for the base model alone.
        examples: the data set, at least one example.
        batch_size: number of rows per forward pass, with the repeated rows.
        pad_id: token that fills up shorter rows of a batch on the right.
        on_batch: called after each batch with (number of rows done, number of all rows), over all adapters.

    Returns:
        Name -> predictions.
    """
    reason = unmixable(task, model)
    if reason:
        _log.info("the adapters are evaluated one after another: %s", reason)
        return one_by_one(task, model, names, examples, batch_size=batch_size, pad_id=pad_id, on_batch=on_batch)
    kept = list(examples)
    total = len(names) * len(kept)
    found: dict[str, list[Predictions]] = {name: [] for name in names}
    at_once = max(1, batch_size // len(names))
    done = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for chosen in eval_batches(kept, at_once):
            for first in range(0, len(names), batch_size):
                group = names[first : first + batch_size]
                parts = _one_batch(task, model, group, {index: kept[index] for index in chosen}, pad_id)
                for name, part in zip(group, parts, strict=True):
                    found[name].append(part)
                done += len(group) * len(chosen)
                on_batch(done, total)
    model.train(was_training)
    return {name: Predictions.joined(parts) for name, parts in found.items()}


def _one_batch(
    task: Task, model: PeftModel, names: Sequence[str], chosen: Mapping[int, Example], pad_id: int
) -> list[Predictions]:
    """The predictions of each adapter for these examples, which are given by their numbers."""
    batch = task.collate([*chosen.values()] * len(names), pad_id)
    found = check_predictions(task, task.predict(model, batch, [name for name in names for _ in chosen]))
    seats = found.rows // len(chosen)
    counts = torch.bincount(seats, minlength=len(names)).tolist()  # the positions are in the order of the adapters
    return found.at(torch.tensor([*chosen] * len(names), device=found.rows.device)).split(counts)


def one_by_one(
    task: Task,
    model: PeftModel,
    names: Sequence[str],
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Predictions]:
    """The same as `predict_many`, with one pass for each name."""
    before, total = model.active_adapters[0], len(names) * len(examples)
    found: dict[str, Predictions] = {}
    for turn, name in enumerate(names):

        def tell(done: int, _: int, turn: int = turn) -> None:
            on_batch(turn * len(examples) + done, total)

        if name == BASE:
            with model.disable_adapter():
                found[name] = predict(task, model, examples, batch_size, pad_id, on_batch=tell)
        else:
            model.set_adapter(name)
            found[name] = predict(task, model, examples, batch_size, pad_id, on_batch=tell)
    model.set_adapter(before)
    return found


def unmixable(task: Task, model: PeftModel) -> str:
    """The reason why PEFT cannot mix adapters in this model's batches; empty if it can."""
    if isinstance(task.narrowed(model), (LoraLayer, AuxiliaryTrainingWrapper)):
        return "the output layer has an adapter of its own"
    if any(settings.use_dora for settings in cast("dict[str, LoraConfig]", model.peft_config).values()):
        return "PEFT cannot mix batches of DoRA"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, _MIXABLE_HEADS):
            return f"PEFT cannot mix batches in {name}, a {type(module.original_module).__name__} trained in full"
    return ""
