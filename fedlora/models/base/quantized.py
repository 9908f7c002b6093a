"""Quantized weights. They are made once, while the full-precision weights are read, and then stored on disk."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from filelock import FileLock
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from fedlora.common.assets import LOG, Say, cache_dir
from fedlora.common.errors import ModelError
from fedlora.tasks.registry import task_of

from . import read
from .devices import DTYPES
from .mended import mend, mend_int8
from .read import Recipe
from .targets import is_within

_LEFT_OUT = 0.05  # largest share of the weights in linear layers that may stay in full precision
_LINEAR = {"int8": Linear8bitLt, "nf4": Linear4bit}


def load(recipe: Recipe, fingerprint: str, say: Say) -> PreTrainedModel:
    """The model from its quantized copy. The copy is made if it is missing, unreadable, or from other libraries.

    Args:
        recipe: says how the model is read.
        fingerprint: the model's fingerprint, part of the copy's name.
        say: called with a line of text before the model is quantized.
    """
    config, saved = recipe.config, _saved(recipe, fingerprint)
    made_by = {package: version(package) for package in ("bitsandbytes", "transformers")}
    saved.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{saved}.lock"):  # processes that wait here read the copy, without the full-precision weights
        if _made_by(saved) == made_by:
            try:
                return _ready(read.weights(recipe, saved, heads=()))
            except ModelError as error:
                LOG.debug("%s: quantizing anew: %s", saved, error)
        say(f"quantizing {config.name} to {config.quantization}, once")
        model = read.weights(recipe, recipe.folder, recipe.heads, _settings(recipe))
        with tempfile.TemporaryDirectory(dir=saved.parent, prefix=".quantize-") as temp, read.quiet():
            copy = Path(temp) / "model"
            model.save_pretrained(copy)
            (copy / "made_by.json").write_text(json.dumps(made_by))
            shutil.rmtree(saved, ignore_errors=True)
            copy.rename(saved)
    return _ready(model)


def check(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise ModelError unless the linear layers of the model were quantized.

    bitsandbytes does not quantize layers of classes that it does not know. This is harmless for a small router, but
    Falcon consists of such layers.
    """
    config, wanted = recipe.config, _LINEAR[recipe.config.quantization]
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_within(name, recipe.unquantized)
    }
    sizes = {name: module.in_features * module.out_features for name, module in linear.items()}
    wrong = [name for name, module in linear.items() if type(module) is not wanted]
    if not linear or sum(sizes[name] for name in wrong) > _LEFT_OUT * sum(sizes.values()):
        got = f"{wrong[0]} is a {type(linear[wrong[0]]).__name__}" if wrong else "it has no linear layers"
        raise ModelError(
            f"{config.name}: model.quantization = {config.quantization!r} had no effect: {got}, expected "
            f"{wanted.__name__}; choose another model, or model.quantization = 'none'"
        )


def _saved(recipe: Recipe, fingerprint: str) -> Path:
    """The folder of the copy; there is one for each content, format, and class of model with its options."""
    config, task = recipe.config, task_of(recipe.config)
    dtype = next(name for name, dtype in DTYPES.items() if dtype == recipe.dtype)
    made = "-".join([task.auto_class().__name__, *(f"{name}={value}" for name, value in task.model_options().items())])
    return cache_dir() / "quantized" / f"{fingerprint}-{config.quantization}-{dtype}-{made}"


def _made_by(saved: Path) -> dict[str, str]:
    try:
        return json.loads((saved / "made_by.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _settings(recipe: Recipe) -> BitsAndBytesConfig:
    """The settings of QLoRA for nf4 (https://arxiv.org/abs/2305.14314), or of LLM.int8() for int8
    (https://arxiv.org/abs/2208.07339)."""
    if recipe.config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(recipe.unquantized))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=recipe.dtype,
        llm_int8_skip_modules=list(recipe.unquantized),
    )


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with two features of bitsandbytes switched off that do harm in training, and two mended."""
    # bitsandbytes warns in every int8 product that it quantizes fp32 and bf16 inputs, which is what the user wanted.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_about_casts)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            if module.weight.device.type == "cpu":
                mend()
            # On CPUs with AVX512-BF16, the first evaluation would repack the weights into a layout without gradients.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            mend_int8()
    return model


def _not_about_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")
