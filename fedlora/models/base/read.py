"""Reads weights with transformers, from safetensors only and without its output, and checks that they fit the task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedlora.common.errors import ModelError
from fedlora.config import ModelConfig
from fedlora.models import mixer as _mixer  # noqa: F401  (transformers then knows this kind too)
from fedlora.tasks.registry import task_of

# Exceptions of transformers for a file that is cut off, or has other shapes or another version.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Recipe:
    """How a base model is to be read.

    Args:
        config: the run's section model.
        folder: folder with the full-precision files.
        device: device for the weights.
        dtype: number format of unquantized weights and of activations.
        heads: modules whose weights in `folder` may be missing or of another shape; see `head.py`.
        unquantized: modules that are not quantized, including the heads.
    """

    config: ModelConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    heads: tuple[str, ...]
    unquantized: tuple[str, ...]


def shapes(config: ModelConfig, folder: Path) -> PreTrainedModel:
    """The unquantized model on the meta device, made from the folder's config.json alone."""
    task = task_of(config)
    try:
        with quiet(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, **task.model_options())
            task.check_architecture(config.name, settings)
            return task.auto_class().from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except UNREADABLE as error:
        raise _unreadable(config, error) from error


def weights(
    recipe: Recipe, folder: Path, heads: tuple[str, ...], quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The model with the weights in `folder`.

    Args:
        recipe: says how the model is read.
        folder: folder with the full-precision files, or with a quantized copy of them.
        heads: the modules whose weights may be missing; they are then initialized.
        quantization: settings by which weights are quantized while they are read; None for a quantized copy, which
            contains its own settings.

    Raises:
        ModelError: the folder cannot be read, or lacks weights that the task needs.
    """
    config, task = recipe.config, task_of(recipe.config)
    # For a quantized copy, the key must be absent, since None would mean "not quantized".
    quantize = {"quantization_config": quantization} if quantization else {}
    try:
        with quiet(), _same_fresh_values(recipe.device):
            model, report = task.auto_class().from_pretrained(
                folder,
                dtype=recipe.dtype,
                device_map={"": recipe.device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below
                **task.model_options(),
                **quantize,
            )
    except UNREADABLE as error:
        raise _unreadable(config, error) from error
    head = tuple(f"{name}." for name in heads)
    wrong = sorted(key for key in report["mismatched_keys"] if not key[0].startswith(head))
    if wrong:
        name, got, expected = wrong[0]
        raise ModelError(
            f"{config.name}: {len(wrong)} weights in {folder} have other shapes than its config.json says, such as "
            f"{name}: got {tuple(got)}, expected {tuple(expected)}; use the config.json that belongs to them"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(head))
    if missing:
        raise ModelError(
            f"{config.name}: {folder} lacks {len(missing)} weights that {config.task} needs, such as {missing[0]}; "
            "choose a model that was trained for it, or another model.task"
        )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, transformers shows no reports and progress bars; what matters of them is checked and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _same_fresh_values(device: torch.device) -> Iterator[None]:
    """Within the block, new heads get the same values in every process; the caller's random numbers do not change."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _unreadable(config: ModelConfig, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0][:300]
    if "Unrecognized configuration class" in reason:  # followed by the names of all others
        kind = reason.split("configuration class ")[1].split("'")[1].rsplit(".", 1)[-1].removesuffix("Config")
        what = task_of(config).kind
        reason = f"transformers has no {what} of the kind {kind}; choose another model, or another model.task"
    return ModelError(f"{config.name} cannot be loaded for model.task = {config.task!r}: {reason}")
