"""LoRA layers put into a base, and their shapes from the base's config alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedlora.common.errors import ConfigError, suggest
from fedlora.config import LoraConfig, ModelConfig, matches, rank_pattern

from . import find_targets, first_head, head_modules, head_shapes, longest, meta_model, summary

ADAPTER, ANCHOR = "default", "anchor"


PREFIX = "base_model.model."


class Down(nn.Linear):
    """PEFT's lora_A with room for a core: x -> R (A x), or A x without one."""

    core: nn.Parameter | None

    def __init__(self, d_in: int, device: torch.device) -> None:
        super().__init__(d_in, 1, bias=False, device=device)
        self.register_parameter("core", None)

    def forward(self, input: Tensor) -> Tensor:
        down = self.before_core(input)
        return down if self.core is None else F.linear(down, self.core)

    def before_core(self, x: Tensor) -> Tensor:
        """A x."""
        return super().forward(x)


def inject(model: nn.Module, targets: Sequence[str], dropout: float) -> PeftModel:
    # GPT-2's layers keep their weights as [d_in, d_out]
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = PeftLoraConfig(
        r=1, lora_alpha=1, target_modules=list(targets), lora_dropout=dropout, fan_in_fan_out=transposed
    )
    with ties_may_be_adapted():
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]


@contextmanager
def ties_may_be_adapted() -> Iterator[None]:
    """Without PEFT's warning that a merge would change both of two tied weights: a merge here unties them first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        yield


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def head_parameters(model: nn.Module, heads: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these modules by the base model's own names."""
    return {
        name.removeprefix(PREFIX): parameter
        for name, parameter in model.named_parameters()
        if any(name.removeprefix(PREFIX).startswith(head + ".") for head in heads)
    }


@dataclass(frozen=True)
class Shapes:
    """What a server needs to know of a base.

    Attributes:
        lora: module -> (d_out, d_in).
        tensors: shapes of what is trained in full, by name.
        head: the values that these have in the base, where training begins with them.
        words: what the head begins with, and why; empty without a head.
        longest: the most tokens that the base has positions for; None without an end.
        classes: what the base calls them, in the order of its own head; nothing where training begins with another.
    """

    lora: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, tuple[int, ...]]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    words: str = ""
    longest: int | None = None
    classes: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """What is chosen for the user: the adapted modules, and the head's start."""
        return {"targets": summary(self.lora), **({"head": self.words} if self.words else {})}


def shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """The adapted modules and the head of a base, from its config and the head's weights: no others are read.

    Raises:
        ModelError: the base cannot be had, or no module fits `lora.target-modules`.
        ConfigError: an entry of `lora.rank-pattern` fits no module that is adapted.
    """
    bare = meta_model(model)
    heads = head_modules(bare)
    targets = find_targets(bare, lora.target_modules, heads)
    check_rank_pattern(lora, targets)
    head, words = first_head(model, head_shapes(bare, heads)) if heads else ({}, "")
    injected = inject(bare, targets, 0.0)
    return Shapes(
        lora={name: shape_of(layer) for name, layer in lora_layers(injected).items()},
        tensors={name: tuple(p.shape) for name, p in head_parameters(injected, heads).items()},
        head=head,
        words=words,
        longest=longest(bare),
        classes=tuple((bare.config.id2label or {}).values()) if head else (),
    )


def check_rank_pattern(lora: LoraConfig, targets: Sequence[str]) -> None:
    """Raises ConfigError where an entry of `lora.rank-pattern` fits no module that is adapted."""
    for pattern in rank_pattern(lora):
        if any(matches(pattern, module) for module in targets):
            continue
        near = suggest(pattern.rsplit(".", 1)[-1], {name.rsplit(".", 1)[-1] for name in targets})
        raise ConfigError(f"lora.rank-pattern: {pattern!r} fits none of the adapted modules{near}")


def shape_of(layer: LoraLayer) -> tuple[int, int]:
    """(d_out, d_in)."""
    return cast("tuple[int, int]", (layer.out_features, layer.in_features))
