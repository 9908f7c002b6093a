"""Loads base models: frozen, on one device, in fp32, bf16, int8 or nf4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlora.common.assets import LOG, Say
from fedlora.common.errors import ModelError
from fedlora.config import ModelConfig
from fedlora.tasks.registry import task_of

from . import quantized, read
from .devices import pick_device, pick_dtype
from .fingerprint import remembered_fingerprint
from .folders import resolve
from .head import fresh, head_in_folder
from .probe import reads_text, uncalled, vocabulary
from .targets import is_within, read_directly


@dataclass(frozen=True)
class BaseModel:
    """A base model, ready for adapters: frozen, in eval mode.

    Args:
        model: the model, with unquantized weights in `compute_dtype` and heads in fp32.
        tokenizer: the model's tokenizer, which has a pad token, or its image processor; see `Task.read_processor`.
        device: the device of all weights.
        fingerprint: fingerprint of the full-precision weights, whatever the quantization.
        quantization: none, int8 or nf4.
        compute_dtype: number format of activations.
        folder: folder with the full-precision files.
        heads: names of the modules that are trained in full; empty if the model has no head.
        head: text about a classifier's head at the start; empty without a head.
        uncalled: names of linear layers that are not called when an input goes through the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    fingerprint: str
    quantization: str
    compute_dtype: torch.dtype
    folder: Path
    heads: tuple[str, ...]
    head: str = ""
    uncalled: frozenset[str] = frozenset()

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter rows of a batch."""
        return pad_id(self.tokenizer)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up shorter rows of a batch; 0 for an image processor."""
    return int(tokenizer.pad_token_id) if reads_text(tokenizer) else 0  # pyright: ignore[reportArgumentType]


def base_fingerprint(config: ModelConfig) -> str:
    """The fingerprint of a base model, without loading it; clients need it in every round."""
    return remembered_fingerprint(_folder(config.name, config.revision))


@lru_cache(maxsize=8)
def _folder(name: str, revision: str) -> Path:
    """The model's folder, cached, since finding it on the hub takes requests."""
    return resolve(name, revision)


def load_base(config: ModelConfig, say: Say = LOG.info, seed: int = 0) -> BaseModel:
    """Load the base model and its tokenizer.

    The first time, quantized weights are stored on disk. Later loads read only these, so that the full-precision
    weights are never in memory.

    Args:
        config: the run's section model.
        say: called with a line of text before steps that take long.
        seed: seed of a new head; with the run's seed, it is the head of the run's round 0.

    Raises:
        ModelError: the model cannot be loaded, there is no such device, or the two do not fit together.
        AssetError: a packaged model cannot be fetched.
    """
    device = pick_device(config.device)
    folder = resolve(config.name, config.revision, say)
    shapes = read.shapes(config, folder)
    heads = head_modules(shapes)
    recipe = read.Recipe(
        config, folder, device, pick_dtype(config.compute_dtype, device), heads, _unquantized(shapes, heads, config)
    )
    identity = remembered_fingerprint(folder)
    if config.quantization == "none":
        model = read.weights(recipe, folder, heads)
    else:
        model = quantized.load(recipe, identity, say)
        quantized.check(model, recipe)
    tokenizer = _tokenizer(config, folder)
    if reads_text(tokenizer):
        _check_tokens(model, tokenizer, config, say)
        model.config.pad_token_id = tokenizer.pad_token_id
    _prepare(model, config, heads)
    head = _set_heads(model, config, folder, heads, seed) if heads else ""
    unused = uncalled(model, tokenizer, config)
    return BaseModel(model, tokenizer, device, identity, config.quantization, recipe.dtype, folder, heads, head, unused)


def meta_model(config: ModelConfig, say: Say = LOG.info) -> PreTrainedModel:
    """The unquantized model without weights, on the meta device, with module names and shapes from config.json.

    Raises:
        ModelError: there is no such model, or it does not fit the task.
    """
    return read.shapes(config, resolve(config.name, config.revision, say, weights=False))


def tokenizer_of(config: ModelConfig, say: Say = LOG.info) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token, or its image processor; the model's weights are not fetched.

    Raises:
        ModelError: there is no such model, or its tokenizer or processor cannot be read.
    """
    return _tokenizer(config, resolve(config.name, config.revision, say, weights=False))


def shared_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that all clients in this process share; loaded again only when the model's files change."""
    return _remembered_tokenizer(config, base_fingerprint(config))


@lru_cache(maxsize=2)
def _remembered_tokenizer(config: ModelConfig, fingerprint: str) -> PreTrainedTokenizerBase:
    return tokenizer_of(config)


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's modules outside the pretrained body.

    A causal language model has none, and neither has a model that is nothing but a body, such as CLIP.
    """
    if model.get_output_embeddings() is not None or model.base_model is model:
        return ()
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


def head_shapes(model: nn.Module, heads: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the heads' parameters, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if is_within(name, heads)}


def first_head(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], str]:
    """The head in the model's folder, if it fits, and a text about the first head; see `head_in_folder`."""
    return head_in_folder(config, _folder(config.name, config.revision), shapes)


def _set_heads(model: PreTrainedModel, config: ModelConfig, folder: Path, heads: tuple[str, ...], seed: int) -> str:
    """Give the heads the same first values as the server does; return a text about them."""
    found, words = head_in_folder(config, folder, head_shapes(model, heads))
    values = found or fresh(head_shapes(model, heads), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return words


def _unquantized(model: PreTrainedModel, heads: tuple[str, ...], config: ModelConfig) -> tuple[str, ...]:
    """The modules that are not quantized.

    These are heads, output embeddings, a pooler, which is the input of a head, what the task names, and layers whose
    weights the model reads without calling them. They are named here, since transformers' own choice would quantize a
    head that has a bias.
    """
    output, of_task = model.get_output_embeddings(), task_of(config).unquantized()
    kept = (
        name for name, module in model.named_modules() if module is output or name.endswith("pooler") or name in of_task
    )
    return (*heads, *kept, *sorted(read_directly(model)))


def _tokenizer(config: ModelConfig, folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token, or the image processor in its place."""
    task = task_of(config)
    try:
        with read.quiet():
            tokenizer = task.read_processor(folder)
    except read.UNREADABLE as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".")[:300]  # often a list of all kinds
        where = f"{config.name}: " * (config.name != str(folder)) + str(folder)
        raise ModelError(
            f"{where} has no {task.processor} that can be read ({reason}); use the files that were saved with the model"
        ) from error
    if not reads_text(tokenizer):
        return tokenizer
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{config.name}: its tokenizer has neither a pad token nor an end token; add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, say: Say) -> None:
    """Check that the embeddings have a row for every token. A pad token without a row is replaced by the end token.

    Raises:
        ModelError: the tokenizer has tokens that the model lacks.
    """
    rows = vocabulary(model)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    pad, end = str(tokenizer.pad_token), tokenizer.eos_token
    if pad in beyond and end and end not in beyond:
        say(f"{config.name}: its pad token {pad!r} has no embedding; batches are filled with {end!r}")
        beyond.pop(pad)
        tokenizer.pad_token = end
    if beyond:
        token = min(beyond, key=lambda name: beyond[name])
        raise ModelError(
            f"{config.name}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of its embeddings, such as "
            f"{token!r} = {beyond[token]}; use the tokenizer that belongs to it, or resize the embeddings and save both"
        )


def _prepare(model: PreTrainedModel, config: ModelConfig, heads: tuple[str, ...]) -> None:
    """Freeze the model and prepare it for training.

    Norms stay in the compute dtype: they compute in fp32 internally, and a frozen weight gains nothing from more
    bits. PEFT's `prepare_model_for_kbit_training` converts all unquantized weights to fp32, which doubles the memory
    of the embeddings and of the residual stream.
    """
    model.requires_grad_(False)
    model.eval()
    for name in heads:
        model.get_submodule(name).float().register_forward_pre_hook(_to_fp32)
    model.config.use_cache = False  # not useful in training; generate() has a setting of its own
    if getattr(model.config, "rescale_every", 0):
        # Against overflow in fp16, RWKV halves weights of deep layers in place when it evaluates, but not the adapters.
        model.config.rescale_every = 0
    if config.gradient_checkpointing:
        # Not reentrant, so that gradients reach the adapters although the embeddings need none.
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _to_fp32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() for x in inputs)
