"""Base models in memory: frozen, on one device, in fp32, bf16, int8 or nf4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora.assets import LOG, Say
from fedlora.config import ModelConfig
from fedlora.errors import ModelError

from . import quantized, read
from .devices import pick_device, pick_dtype
from .fingerprint import remembered_fingerprint
from .folders import resolve


@dataclass(frozen=True)
class BaseModel:
    """A base model, ready for adapters: frozen, in eval mode.

    Args:
        model: its unquantized weights are in `compute_dtype`, the heads in fp32.
        tokenizer: has a pad token.
        device: where all of it lies.
        fingerprint: of the full-precision weights, whatever the quantization.
        quantization: none, int8 or nf4.
        compute_dtype: of activations.
        folder: the full-precision files.
        heads: modules that start with fresh values and have to be trained in full; none for causal-lm.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    fingerprint: str
    quantization: str
    compute_dtype: torch.dtype
    folder: Path
    heads: tuple[str, ...]

    @property
    def pad_id(self) -> int:
        """The token that fills batches."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=8)
def base_fingerprint(config: ModelConfig) -> str:
    """The fingerprint of a base that is not in memory; remembered, since clients ask for it in every round."""
    return remembered_fingerprint(resolve(config.name, config.revision))


def load_base(config: ModelConfig, say: Say = LOG.info) -> BaseModel:
    """The base model and its tokenizer.

    Quantized weights are kept on disk after the first time; later loads read them alone and never hold
    the full-precision ones.

    Args:
        config: what to load, and how.
        say: gets a line of text before anything that takes long.

    Raises:
        ModelError: the model, the device, or the combination of them cannot be had.
        AssetError: a packaged model cannot be fetched.
    """
    device = pick_device(config.device)
    folder = resolve(config.name, config.revision, say)
    shapes = read.shapes(config, folder)
    heads = head_modules(shapes)
    recipe = read.Recipe(
        config, folder, device, pick_dtype(config.compute_dtype, device), heads, _unquantized(shapes, heads)
    )
    identity = remembered_fingerprint(folder)
    if config.quantization == "none":
        model = read.weights(recipe, folder, heads)
    else:
        model = quantized.load(recipe, identity, say)
    quantized.check(model, recipe)
    tokenizer = _tokenizer(config, folder)
    _prepare(model, tokenizer, config, heads)
    return BaseModel(model, tokenizer, device, identity, config.quantization, recipe.dtype, folder, heads)


def meta_model(config: ModelConfig, say: Say = LOG.info) -> PreTrainedModel:
    """The unquantized model without weights, on the meta device: module names and shapes, from config.json alone.

    Raises:
        ModelError: there is no such model, or it does not serve the task.
    """
    return read.shapes(config, resolve(config.name, config.revision, say, weights=False))


def tokenizer_of(config: ModelConfig, say: Say = LOG.info) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token; its weights stay where they are.

    Raises:
        ModelError: there is no such model, or its tokenizer cannot be read.
    """
    return _tokenizer(config, resolve(config.name, config.revision, say, weights=False))


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's own modules, beside the pretrained body; none for a causal LM."""
    if model.get_output_embeddings() is not None:
        return ()
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


def _unquantized(model: PreTrainedModel, heads: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that keep full weights: heads, output embeddings, and a pooler, which feeds a head.

    Named here, since transformers' own choice quantizes a head that has a bias.
    """
    output = model.get_output_embeddings()
    kept = (name for name, module in model.named_modules() if module is output or name.endswith("pooler"))
    return (*heads, *kept)


def _tokenizer(config: ModelConfig, folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token."""
    try:
        with read.quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except read.UNREADABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{config.name}: {folder} has no tokenizer that can be read: {reason}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{config.name}: its tokenizer has neither a pad token nor an end token; add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, heads: tuple[str, ...]
) -> None:
    """Freezes the model and readies it for training.

    Norms stay in the compute dtype: they compute in fp32 inside, and a frozen weight gains nothing from more
    bits. Raising all that is unquantized to fp32, as peft's `prepare_model_for_kbit_training` does, doubles
    the memory of the embeddings and of the residual stream.
    """
    model.requires_grad_(False)
    model.eval()
    for name in heads:
        model.get_submodule(name).float().register_forward_pre_hook(_to_fp32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # of no use in training; generate() keeps its own setting
    if config.gradient_checkpointing:
        # Not reentrant: gradients then reach the adapters without any on the embeddings.
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _to_fp32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() for x in inputs)
