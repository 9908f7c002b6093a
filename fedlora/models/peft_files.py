"""Writes and reads PEFT checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedlora.adapters import AdapterState, LoraFactors, compress
from fedlora.adapters.flat import PEFT
from fedlora.adapters.kinds.base import MAGNITUDE
from fedlora.common.assets import hub_name
from fedlora.common.errors import AdapterError
from fedlora.config import ModelConfig
from fedlora.tasks.registry import task_of


def save_checkpoint(adapter: AdapterState, folder: Path, model: ModelConfig, about: Mapping[str, object]) -> None:
    """Write a PEFT checkpoint that `PeftModel.from_pretrained` loads on the unchanged base model.

    Every module is written at its numerical rank, with scaling 1; unequal ranks are in `rank_pattern`. An adapter with
    magnitudes becomes PEFT's DoRA.

    Args:
        adapter: the whole trained adapter, folds included.
        folder: folder of the checkpoint; made if it is missing.
        model: the run's section model, for the checkpoint's config.
        about: facts for the file fedlora.json beside it, such as configuration and base fingerprint.
    """
    small = compress(adapter.lora)
    ranks = {name: factors.rank for name, factors in small.items()}
    top = max(ranks.values())
    heads = sorted({name.rsplit(".", 1)[0].split(".")[0] for name in adapter.tensors if not is_magnitude(name)})
    config = PeftLoraConfig(
        r=top,
        lora_alpha=top,
        target_modules=list(small),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != top},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != top},
        modules_to_save=heads or None,
        use_dora=has_magnitudes(adapter),
        task_type=task_of(model).peft_type,
        base_model_name_or_path=hub_name(model.name),
        inference_mode=True,
    )
    scaled = {n: LoraFactors(A=f.A * f.scaling, B=f.B, scaling=1.0) for n, f in small.items()}
    named = PEFT.put(AdapterState(lora=scaled, tensors=adapter.tensors))
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    part, old = folder.with_name(f".{folder.name}-part"), folder.with_name(f".{folder.name}-old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    config.save_pretrained(str(part))
    save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
    (part / "fedlora.json").write_text(json.dumps(about, indent=2) + "\n")
    if folder.exists():  # so that an interruption leaves a whole checkpoint, the old or the new one
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def is_magnitude(name: str) -> bool:
    """Whether a tensor of this name is DoRA's magnitude of a module."""
    return name.endswith(f".{MAGNITUDE}")


def has_magnitudes(adapter: AdapterState) -> bool:
    """Whether the adapter is DoRA's, so that its factors alone are not its update."""
    return any(map(is_magnitude, adapter.tensors))


def read_adapter(folder: Path) -> AdapterState:
    """The adapter in a PEFT checkpoint; DoRA's magnitudes are tensors "<module>.lora_magnitude_vector".

    Raises:
        AdapterError: the files cannot be read, or contain something else than LoRA factors.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "lora_alpha" not in settings:  # PEFT would take its own default
            raise ValueError("adapter_config.json does not describe a LoRA adapter, it lacks lora_alpha")
        config = cast("PeftLoraConfig", PeftLoraConfig.from_pretrained(str(folder)))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise AdapterError(f"{folder}: the adapter cannot be read: {str(error).splitlines()[0]}") from None
    start, end = PEFT.of_factor("|", "A").split("|")
    modules = [name.removeprefix(start).removesuffix(end) for name in tensors if name.endswith(end)]
    alphas = cast("Mapping[str, float]", config.alpha_pattern)
    scalings: dict[str, float] = {}
    for module in modules:
        rank, alpha = len(tensors[PEFT.of_factor(module, "A")]), alphas.get(module, config.lora_alpha)
        scalings[module] = alpha / (rank**0.5 if config.use_rslora else rank)
    found = PEFT.get(tensors, scalings)
    lacking = next((module for module, factors in found.lora.items() if not factors.B.numel()), "")
    if lacking or not found.lora:
        raise AdapterError(f"{folder}: the checkpoint has no {f'B of {lacking}' if lacking else 'LoRA factors'}")
    return found


def described(adapter: Path) -> dict[str, Any]:
    """The content of the adapter's fedlora.json; empty if there is no such file.

    Raises:
        AdapterError: the file is damaged.
    """
    path = adapter / "fedlora.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("config", {}), dict):
        raise AdapterError(f"{path}: cannot be read: it is not the file that a run wrote beside its adapter")
    return about
