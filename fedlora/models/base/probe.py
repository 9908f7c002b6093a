"""Tries a base model with a few inputs: does it run, fit its task and ignore padding, and which layers does it call?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedlora.common.errors import ModelError
from fedlora.config import ModelConfig
from fedlora.tasks.registry import task_of

from .devices import DTYPES

_PADS = 5
# By this share of their norm, a row's logits may change with padding; rounding in bf16 and int8 changes them by less.
_PADDING = 0.1
_FAULTS = (ValueError, KeyError, IndexError, AttributeError, TypeError, NotImplementedError, RuntimeError)


def uncalled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> frozenset[str]:
    """The names of the linear layers that the model does not call for an input. Some may be experts for other texts.

    Raises:
        ModelError: the model cannot compute, its output depends on padding, or it does not fit the task.
    """
    task = task_of(config)
    found = task.first_inputs(tokenizer, vocabulary(model) if reads_text(tokenizer) else 0)
    inputs = {
        name: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for name, values in found.items()
    }
    with _watched(model) as called:
        alone = _logits(model, inputs, config)
    task.check_first(alone, config.name, type(model).__name__)
    if reads_text(tokenizer) and "attention_mask" in inputs:
        longer = _with_a_longer_row(model, tokenizer, inputs)
        _check_padding(alone, _logits(model, longer, config)[: len(alone)], model, config)
    return frozenset(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and name not in called
    )


def _logits(model: PreTrainedModel, batch: dict[str, Tensor], config: ModelConfig) -> Tensor:
    try:
        with torch.no_grad():
            return task_of(config).first_logits(model, batch).float()
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        dtype = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        inputs, own = _described(batch)
        raise ModelError(
            f"{config.name}: a first pass of {inputs} fails with model.quantization = "
            f"{config.quantization!r} in {dtype} ({type(error).__name__}: {str(error).splitlines()[0][:200]}); {own}"
            "choose another model.quantization or model.compute-dtype, or another model"
        ) from error


def _described(batch: dict[str, Tensor]) -> tuple[str, str]:
    """Words for the inputs of a batch, and what else to do if the model fails on them."""
    if "pixel_values" not in batch:
        return f"{batch['input_ids'].shape[1]} tokens", ""
    shape = list(batch["pixel_values"].shape[1:])
    return f"{shape}, as its image processor makes images,", "use the processor that was saved with the model, or "


def _with_a_longer_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same rows with a longer row, to whose length they are padded, as in training."""
    ids = batch["input_ids"]
    pads = ids.new_full((len(ids), _PADS), int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
    more = ids[:1, 1:2] if ids.shape[1] > 1 else ids[:1]  # neither the start nor the end token, if possible
    longer = torch.cat([ids[:1, :1], more.repeat(1, _PADS), ids[:1, 1:]], dim=1)
    wide = torch.cat([torch.cat([ids, pads], dim=1), longer])
    mask = torch.ones_like(wide)
    mask[:-1, ids.shape[1] :] = 0
    return {"input_ids": wide, "attention_mask": mask}


def _check_padding(alone: Tensor, padded: Tensor, model: PreTrainedModel, config: ModelConfig) -> None:
    same = padded[:, : alone.shape[1]]  # logits of each token without padding, or of each class
    change = float((alone - same).norm() / alone.norm().clamp(min=1e-12))
    if change > _PADDING:
        raise ModelError(
            f"{config.name}: the output of {type(model).__name__} for a row changes by {change:.0%} with padding, so "
            "that its loss would depend on the batch; choose another model"
        )


def reads_text(tokenizer: object) -> bool:
    """Whether this is a tokenizer, and not what reads other inputs in its place."""
    return isinstance(tokenizer, PreTrainedTokenizerBase)


def vocabulary(model: PreTrainedModel) -> int:
    """The number of rows of the input embeddings."""
    return cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0]


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[str]]:
    """A set to which the names of the linear layers are added that are called within the block."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
