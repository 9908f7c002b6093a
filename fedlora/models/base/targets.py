"""Chooses the modules of a base model that get LoRA: linear layers by name, all of them, or attention projections."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.common.errors import ModelError
from fedlora.config import matches

# Names of the projections to queries and values, in one layer or in several, for models that PEFT's table lacks.
_QUERY_VALUE = re.compile(
    r"(w?[qv]|query|value)(_proj|_lin|_head|_global)?|w?(qkv|query_key_value)(_proj)?|c_attn|q_b_proj|kv_b_proj",
    re.IGNORECASE,
)
# Names of experts' weights when each had a layer of its own. PEFT takes layers of these names for fused experts.
_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_MIXER = re.compile("mixer|ssm|mamba|timemix", re.IGNORECASE)


def find_targets(model: PreTrainedModel, wanted: str, heads: Sequence[str]) -> tuple[str, ...]:
    """The names of the modules that get LoRA, in the model's order.

    These are always linear layers, and in a language model for images or sound too, those that run on text. They are
    never heads, which are trained in full, nor experts whose weights are fused with those of other experts.

    Args:
        model: the base model, which may be on the meta device.
        wanted: `lora.target-modules`. Names may be regular expressions, as in `lora.rank-pattern`. `auto` takes the
            modules that PEFT's table has for this kind of model, or else the projections to queries and values, or else
            all linear layers of attention or state-space blocks. `all-linear` takes all linear layers but the output
            layer.
        heads: names of the modules that are trained in full.

    Raises:
        ModelError: no module fits, or a name fits no linear layer.
    """
    linear = _linear(model, heads)
    output = model.get_output_embeddings()
    inner = [name for name, module in linear.items() if module is not output]
    if wanted == "all-linear":
        chosen = inner
    elif wanted == "auto":
        chosen = _auto(model, inner)
    else:
        names = [part.strip() for part in wanted.split(",") if part.strip()]
        chosen = _named(model, linear, names, heads)
    if not chosen:
        raise ModelError(
            f"lora.target-modules = {wanted!r}: no attention projections are found in a {type(model).__name__}; its "
            f"linear modules are {_leaves(inner) or 'none'}; name some of them, or use all-linear"
            if inner
            else f"lora.target-modules = {wanted!r}: a {type(model).__name__} has no linear layers for LoRA"
        )
    return tuple(chosen)


def summary(targets: Iterable[str]) -> str:
    """The number of modules of each name, such as "q_proj x30, v_proj x30"."""
    counts = Counter(name.rsplit(".", 1)[-1] for name in targets)
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def read_directly(model: nn.Module) -> set[str]:
    """The linear layers whose weights the model reads without calling them; an adapter there would have no effect.

    State-space blocks pass the weights of all layers but their input projection to one kernel, and torch's own
    attention does so with its output projection.
    """
    blocks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "conv1d", None), nn.Module) and hasattr(module, "in_proj")
    }
    attention = {
        f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    return attention | {
        f"{block}.{name}"
        for block, module in blocks.items()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and not name.startswith("in_proj")
    }


def fused_experts(model: nn.Module) -> list[str]:
    """The modules that have the weights of all experts of a layer in one tensor."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in name and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]


def _taken_for_experts(model: nn.Module) -> set[str]:
    """The linear layers that PEFT would, by their names, take for fused experts, in a model that has such experts."""
    if not fused_experts(model):
        return set()
    return {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in _OF_EXPERTS}


def _linear(model: PreTrainedModel, heads: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that may be targets, by name."""
    left_out = read_directly(model) | _taken_for_experts(model)
    sees_text = _text_part(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name not in left_out
        and not is_within(name, heads)
        and sees_text(name)
    }


def _text_part(model: PreTrainedModel) -> Callable[[str], bool]:
    """A function that says whether a module may be a target. In a language model for images or sound too, these are
    the modules that run on text; in a model that is nothing but a body, such as CLIP, they are all."""
    if (
        model.base_model is model
        or model.config.get_text_config(decoder=True) is model.config
        or not _other_inputs(model)
    ):
        return lambda name: True
    body, output = model.get_decoder(), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is body)
    outer = [name for name, module in model.named_modules() if module is output]
    return lambda name: is_within(name, [prefix]) or name in outer


def _other_inputs(model: PreTrainedModel) -> bool:
    return any(hasattr(model.config, f"{kind}_config") for kind in ("vision", "audio", "image", "speech"))


def _auto(model: PreTrainedModel, inner: Sequence[str]) -> list[str]:
    kind = model.config.get_text_config(decoder=True).model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, [])
    if isinstance(known, str):
        by_table = [name for name in inner if re.fullmatch(known, name)]
    else:
        by_table = [name for name in inner if is_named(name, known)]
    classes = {name: type(module).__name__ for name, module in model.named_modules()}

    def inside(name: str, what: re.Pattern[str]) -> bool:
        parts = name.split(".")
        return any(what.search(classes[".".join(parts[:end])]) for end in range(1, len(parts)))

    attention = [name for name in inner if inside(name, _ATTENTION)]
    by_role = [name for name in attention if _QUERY_VALUE.fullmatch(name.rsplit(".", 1)[-1])]
    return by_table or by_role or attention or [name for name in inner if inside(name, _MIXER)]


def _named(
    model: PreTrainedModel, linear: Mapping[str, nn.Module], names: Sequence[str], heads: Sequence[str]
) -> list[str]:
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ModelError(f"lora.target-modules = {name!r}: it is no regular expression: {error}") from None
        if not any(matches(name, module) for module in linear):
            raise ModelError(f"lora.target-modules = {name!r}: {_why_not(model, linear, name, heads)}")
    return [module for module in linear if any(matches(name, module) for name in names)]


def _why_not(model: PreTrainedModel, linear: Mapping[str, nn.Module], name: str, heads: Sequence[str]) -> str:
    """The reason why a name fits no module that can be a target, and what to do."""
    found = {module: what for module, what in model.named_modules() if matches(name, module)}
    held = [parameter for parameter, _ in model.named_parameters() if matches(name, parameter)]
    fused, unseen = fused_experts(model), read_directly(model)
    advice = f"this model's linear modules are {_leaves(linear)}"
    kind = next((type(what).__name__ for what in found.values()), "")
    near = get_close_matches(name.rsplit(".", 1)[-1], {leaf.rsplit(".", 1)[-1] for leaf in linear}, n=1, cutoff=0.6)
    if any(is_within(module, fused) for module in [*found, *held]) or _taken_for_experts(model) & {*found}:
        why = "the experts' weights are fused, one tensor for all of a layer, and LoRA here is of linear layers alone"
    elif any(is_within(module, heads) for module in found):
        why = "it is a part of the head, which is trained in full without being named"
    elif any(module in unseen for module in found):
        why = "the model reads these weights without calling the layer, so that LoRA would have no effect"
    elif any(isinstance(what, nn.Linear | Conv1D) for what in found.values()):
        why = "it belongs to the part for other inputs than text"
    elif found:
        why = f"it is of class {kind}, and LoRA here is of linear layers alone"
    else:
        why = "there is no such module" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{why}; {advice}"


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module's name is one of these, or ends with one after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_within(module: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of these, or a part of one."""
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
