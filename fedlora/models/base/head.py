"""The first values of a classifier's head: those in the model's folder if they fit, or new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedlora.config import ModelConfig

from .fingerprint import weight_files


def head_in_folder(
    config: ModelConfig, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], str]:
    """The head in a model's folder, in fp32, and a text about the head with which the run begins.

    Args:
        config: the run's section model; its `head` says whether the folder's head is wanted.
        folder: folder with the full-precision weights.
        shapes: shapes of the head's parameters, by name.

    Returns:
        The head's parameters by name; empty if a new head is wanted, or the folder has none that fits. The text names
        the head up to a colon, and then gives the reason.
    """
    if config.head == "fresh":
        return {}, "a fresh head: model.head = 'fresh'"
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as weights:
            there = shapes.keys() & set(weights.keys())
            found |= {name: weights.get_tensor(name).float() for name in sorted(there)}
    if not found:
        return {}, "a fresh head: the model has none"
    for name, shape in shapes.items():
        if name not in found:
            return {}, f"a fresh head: the model's own lacks {name}"
        if found[name].shape != shape:
            got = tuple(found[name].shape)
            return {}, f"a fresh head: {name} of the model's own is {got}, and model.labels = {config.labels}"
    return {name: found[name] for name in shapes}, f"the model's own head: {_classes(folder, config.labels)}"


def fresh(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A new head: weights from N(0, 0.02^2) as in BERT, ones for norms, zeros for biases; drawn in the order of names.

    The head depends only on the seed, so that the head of a run's round 0 can be made again from the run's seed.

    Args:
        shapes: shapes of the head's parameters, by name.
        seed: the run's seed.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator) * 0.02
        if len(size) > 1
        else torch.full(size, float(name.endswith("weight")))
        for name, size in sorted(shapes.items())
    }


def _classes(folder: Path, count: int) -> str:
    """Text with the number of classes and the model's names for them, whose order the data must have too."""
    names = json.loads((folder / "config.json").read_text("utf-8")).get("id2label", {})
    ordered = [str(names.get(str(number), "")) for number in range(count)]
    return f"{count} classes" + (f", {', '.join(ordered)}" if all(ordered) else "")
