"""Spectra of an adapter on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def adapter_spectra(folder: Path, most: int = 32) -> list[list[float]]:
    """The largest singular values of each module's ΔW = scaling B A, by QR, without making a d_out x d_in matrix.

    Args:
        folder: folder of a PEFT checkpoint.
        most: number of values for each module; if a module has fewer, the others are zeros.

    Raises:
        OSError, ValueError, KeyError: there is no such checkpoint, or it cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found: list[list[float]] = []
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        B = tensors[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha, rank = _pattern(about, "alpha_pattern", "lora_alpha", module), A.shape[0]
        scaling = alpha / (rank**0.5 if about.get("use_rslora") else rank)
        inner = torch.linalg.qr(B.double(), mode="r").R @ torch.linalg.qr(A.double().T, mode="r").R.T
        values = (scaling * torch.linalg.svdvals(inner))[:most].tolist()
        found.append(values + [0.0] * (most - len(values)))
    return found


def _pattern(about: Mapping[str, Any], pattern: str, default: str, module: str) -> float:
    """A module's own value in a PEFT config, or the default one; keys are module names or their ends."""
    for key, value in (about.get(pattern) or {}).items():
        if module == key or module.endswith(f".{key}"):
            return float(value)
    return float(about[default])
