"""Unties weights that two modules share, such as input and output embeddings, before one of them is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def tied_with(model: nn.Module, name: str) -> str:
    """The name of another module that shares this module's weight; empty if there is none."""
    weight = _linear(model, name).weight
    for other, module in model.named_modules():
        theirs = getattr(module, "weight", None)
        if theirs is weight and other.removesuffix(".base_layer") != name:
            return other
    return ""


def untie(model: PreTrainedModel, name: str) -> str:
    """Give a module its own copy of a weight that it shares.

    The model's config has one switch for all shared weights. Therefore all of them are untied, and a saved copy has
    each of them.

    Returns:
        The name of the other module; empty if the weight was not shared.
    """
    other = tied_with(model, name)
    if not other:
        return ""
    seen: set[int] = set()
    for path, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if id(parameter) in seen:
            module, _, leaf = path.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(module), leaf, own)
        seen.add(id(parameter))
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    vars(model)["all_tied_weights_keys"] = {}
    return other


def _linear(model: nn.Module, name: str) -> Any:
    module: Any = model.get_submodule(name)
    return getattr(module, "base_layer", module)  # below a LoRA layer
