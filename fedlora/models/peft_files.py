"""Writes and reads PEFT checkpoints, and those of adapters that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, compress
from fedlora.adapters.flat import PEFT
from fedlora.adapters.kinds.base import MAGNITUDE
from fedlora.common.assets import hub_name
from fedlora.common.errors import AdapterError
from fedlora.config import ModelConfig
from fedlora.tasks.registry import task_of

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_OWN = "FEDLORA"  # instead of PEFT's name of a method, which PEFT refuses


def save_checkpoint(adapter: AdapterState, folder: Path, model: ModelConfig, about: Mapping[str, object]) -> None:
    """Write a PEFT checkpoint that `PeftModel.from_pretrained` loads on the unchanged base model.

    Every module is written at its numerical rank, with scaling 1; unequal ranks are in `rank_pattern`. An adapter with
    magnitudes becomes PEFT's DoRA. An adapter without any factors, of a kind that adds no fixed matrix, is written as
    its tensors, which only `read_parts` reads.

    Args:
        adapter: the whole trained adapter, folds included.
        folder: folder of the checkpoint; made if it is missing.
        model: the run's section model, for the checkpoint's config.
        about: facts for the file fedlora.json beside it, such as configuration and base fingerprint.
    """
    if not adapter.lora:
        _save(folder, adapter.tensors, about, lambda part: _write_json(part / _CONFIG, {"peft_type": _OWN}))
        return
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
    _save(folder, named, about, lambda part: config.save_pretrained(str(part)))


def _save(
    folder: Path, named: Mapping[str, Tensor], about: Mapping[str, object], configure: Callable[[Path], None]
) -> None:
    """Write a checkpoint with these tensors in place of an earlier one, whole or not at all.

    Args:
        folder: folder of the checkpoint.
        named: the tensors.
        about: facts for the file fedlora.json.
        configure: writes the checkpoint's config into a folder.
    """
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    part, old = folder.with_name(f".{folder.name}-part"), folder.with_name(f".{folder.name}-old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    configure(part)
    save_file(tensors, part / _TENSORS, metadata={"format": "pt"})
    _write_json(part / "fedlora.json", about)
    if folder.exists():  # so that an interruption leaves a whole checkpoint, the old or the new one
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


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
    check_factors(folder)
    try:
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or "lora_alpha" not in settings:  # PEFT would take its own default
            raise ValueError("adapter_config.json does not describe a LoRA adapter, it lacks lora_alpha")
        config = cast("PeftLoraConfig", PeftLoraConfig.from_pretrained(str(folder)))
        tensors = load_file(folder / _TENSORS)
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


def is_own(folder: Path) -> bool:
    """Whether this is a checkpoint of parts that no factors stand for, which is no PEFT checkpoint."""
    try:
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("peft_type") == _OWN


def check_factors(folder: Path) -> None:
    """Raise AdapterError for a checkpoint of parts that no factors stand for."""
    if is_own(folder):
        kind = described(folder).get("config", {}).get("lora.kind", "its kind")
        raise AdapterError(
            f"{folder}: what lora.kind = {kind} adds to a layer is no fixed matrix, so that the adapter has no LoRA "
            "factors and cannot be merged; only fedlora evaluate reads it, without --lm-eval: for anything else, train "
            "with another lora.kind"
        )


def read_parts(folder: Path) -> AdapterState:
    """The adapter in a checkpoint of parts that no factors stand for; see `is_own`.

    Raises:
        AdapterError: the tensors cannot be read.
    """
    try:
        return AdapterState(tensors=load_file(folder / _TENSORS))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: the adapter cannot be read: {str(error).splitlines()[0]}") from None


def read_any(folder: Path) -> AdapterState:
    """The adapter in a checkpoint of either sort: pairs of factors, or parts that no factors stand for.

    Raises:
        AdapterError: the checkpoint cannot be read.
    """
    return read_parts(folder) if is_own(folder) else read_adapter(folder)


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
