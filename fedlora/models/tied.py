"""Weights that two modules share, such as input and output embeddings: untied before one of them is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def tied_with(model: nn.Module, name: str) -> str:
    """Another module that has the weight of this one; empty when it is its own."""
    weight = _linear(model, name).weight
    for other, module in model.named_modules():
        theirs = getattr(module, "weight", None)
        if theirs is weight and other.removesuffix(".base_layer") != name:
            return other
    return ""


def untie(model: PreTrainedModel, name: str) -> str:
    """Give a module its own copy of a weight that it shares; the name of the other module, or nothing.

    The model's config is changed with it, so that a saved copy keeps both weights.
    """
    other = tied_with(model, name)
    if other:
        module = _linear(model, name)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        vars(model)["all_tied_weights_keys"] = {}
    return other


def _linear(model: nn.Module, name: str) -> Any:
    module: Any = model.get_submodule(name)
    return getattr(module, "base_layer", module)  # below a LoRA layer
