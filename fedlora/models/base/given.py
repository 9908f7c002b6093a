"""Writes a model of a Python program to files, from which a run reads it like any other base model.

A run quantizes its base model, puts adapters in, and reads it again. With a copy in files, the program's own model is
not changed, and the fingerprint is that of a folder with the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from fedlora.common.errors import ModelError

from .read import quiet


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer.

    Args:
        model: a full-precision model of one of transformers' own classes.
        tokenizer: the model's tokenizer, image processor, or processor that has both.
        folder: folder for the files; it is new or empty.

    Raises:
        ModelError: the model could not be read back unchanged, or cannot be written.
    """
    check(model, tokenizer)
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, RuntimeError) as error:  # safetensors raises RuntimeError for weights that overlap in part
        raise ModelError(
            f"model: it cannot be written to {folder} ({str(error).splitlines()[0]}); a run reads its base model from "
            "files in the folder for temporary files (TMPDIR)"
        ) from error


def check(model: Any, tokenizer: Any) -> None:
    """Raise ModelError unless the model could be read back unchanged from the files to which it would be written."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model: got {_kind(model)}, expected a model of transformers (a PreTrainedModel)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase | ImageProcessingMixin | ProcessorMixin):
        raise ModelError(
            f"model: got {_kind(tokenizer)} beside the model, expected the tokenizer of transformers, for images the "
            "image processor, or for both the processor"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            "model: its weights are quantized already; give the model in full precision, and set model.quantization"
        )
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(
            f"model: {_kind(model)} is a class of your own, but a run reads its base with transformers' own classes; "
            "give a model of one of them"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("model: some weights are not in memory (on the meta device, or offloaded); load all of them")
    with torch.device("meta"), quiet():
        plain = type(model)(copy.deepcopy(model.config))
    found, expected = _shapes(model), _shapes(plain)
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if odd:
        got, wanted = (str(shapes.get(odd[0], "nothing")) for shapes in (found, expected))
        raise ModelError(
            f"model: it differs from its config: {odd[0]} is {got}, expected {wanted}; give a plain model whose config "
            "describes it (for a PEFT model, call merge_and_unload)"
        )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}".removeprefix("builtins.")
