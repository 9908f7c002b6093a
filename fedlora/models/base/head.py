"""The first values of a classifier's head: those in the model's folder where they fit, or fresh ones."""

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
    """The head in a model's folder, in fp32, and in words what the run begins with.

    Args:
        config: says whether it is wanted.
        folder: with the full-precision weights.
        shapes: of the head's parameters, by name.

    Returns:
        Nothing where a fresh head is wanted, or the folder's is another or none; the words are short up to a colon,
        and then say why.
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
    """A run's fresh head: weights from N(0, 0.02^2) as in BERT, norms' ones, biases zero; drawn in the order of names.

    It depends on the seed alone, so that whoever knows the run's has the head that its round 0 was measured with.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator) * 0.02
        if len(size) > 1
        else torch.full(size, float(name.endswith("weight")))
        for name, size in sorted(shapes.items())
    }


def _classes(folder: Path, count: int) -> str:
    """How many classes, and what the model calls them, where it does; a data set's have to be in the same order."""
    names = json.loads((folder / "config.json").read_text("utf-8")).get("id2label", {})
    ordered = [str(names.get(str(number), "")) for number in range(count)]
    return f"{count} classes" + (f", {', '.join(ordered)}" if all(ordered) else "")
