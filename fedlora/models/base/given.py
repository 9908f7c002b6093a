"""A model that a Python program holds, written to the files that every base is read from.

A run quantizes, adapts and rereads its base. It does so with its own copy, from files: the program's model stays as it
is, and the fingerprint is that of a folder with the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlora.common.errors import ModelError

from .read import quiet


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer.

    Args:
        model: of one of transformers' own classes, in full precision.
        tokenizer: the model's.
        folder: is made, or is empty.

    Raises:
        ModelError: another class could not read it back as it is, or it cannot be written.
    """
    check(model, tokenizer)
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, RuntimeError) as error:  # safetensors raises RuntimeError for weights that overlap in part
        raise ModelError(
            f"model: it cannot be written to {folder} ({str(error).splitlines()[0]}); a run reads its base from files, "
            "in the folder for temporary ones (TMPDIR)"
        ) from error


def check(model: Any, tokenizer: Any) -> None:
    """Raises ModelError unless the files that the model would be written to say all that it is."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model: got {_kind(model)}, expected a model of transformers (a PreTrainedModel)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"model: got {_kind(tokenizer)} beside the model, expected the tokenizer of transformers")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            "model: its weights are quantized already; give the model in full precision, and set model.quantization"
        )
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(
            f"model: {_kind(model)} is a class of your own, and a run reads its base with transformers' own classes; "
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
            f"model: it is not what its config says: {odd[0]} is {got}, expected {wanted}; give a plain model, whose "
            "config was changed with it (of PEFT: merge_and_unload)"
        )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}".removeprefix("builtins.")
