"""Many adapters beside one base in one pass: each batch's rows are repeated, once for every adapter.

PEFT's mixed batches: the base's layers see all rows together, each adapter's factors only its own. As in S-LoRA
(Sheng et al. 2023, https://arxiv.org/abs/2311.03285), whose kernels for unequal ranks are not used here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fedlora.data import Example, eval_batches
from fedlora.tasks.base import Task
from fedlora.tasks.checked import check_predictions
from fedlora.tasks.predict import predict
from fedlora.tasks.scores import Predictions

# The base as it is, among the names of adapters.
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
    """What each adapter says at every labelled position of a data set: `evaluate.predict` of each, in one pass.

    Where PEFT cannot mix this model's batches, the adapters take their turns, which is said once.

    Args:
        task: that the examples are of.
        model: with all the adapters loaded, of any ranks; unmerged.
        names: the adapters', and `BASE` for the bare base; each once.
        examples: at least one.
        batch_size: rows per forward pass, the repeated ones included.
        pad_id: fills the batches' right side.
        on_batch: called after each batch with (rows done, rows), of all adapters together.
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
    """What each adapter says of these examples, which are given by their places."""
    batch = task.collate([*chosen.values()] * len(names), pad_id)
    found = check_predictions(task, task.predict(model, batch, [name for name in names for _ in chosen]))
    seats = found.rows // len(chosen)
    counts = torch.bincount(seats, minlength=len(names)).tolist()  # the seats' positions follow one another
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
    """`predict_many` in as many passes as there are names."""
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
    """Why PEFT cannot mix adapters in this model's batches; empty when it can."""
    if isinstance(task.narrowed(model), (LoraLayer, AuxiliaryTrainingWrapper)):
        return "the output layer has an adapter of its own"
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, _MIXABLE_HEADS):
            return f"PEFT cannot mix batches in {name}, a {type(module.original_module).__name__} trained in full"
    return ""
