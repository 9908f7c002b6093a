"""Tiny random models for fast tests: real architectures, real tokenizers, no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_llama(folder: Path, seed: int = 0, **sizes: float) -> Path:
    """A Llama causal LM: 2 layers, hidden 32, 4 query and 2 key-value heads, tied; a byte-level tokenizer.

    `sizes` are LlamaConfig's, in place of these.
    """
    tokenizer = _bytes_tokenizer(
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|unk|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    config.update(sizes)
    return _save(LlamaForCausalLM, config, tokenizer, folder, seed)


def save_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 causal LM, whose layers are Conv1D with weights [d_in, d_out]: 2 layers, hidden 32, 4 heads."""
    tokenizer = _bytes_tokenizer(bos_token="<|end|>", eos_token="<|end|>", unk_token="<|unk|>", pad_token="<|pad|>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    return _save(GPT2LMHeadModel, config, tokenizer, folder, seed)


def save_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT body without a head: 2 layers, hidden 32, 4 heads; a byte-level tokenizer."""
    tokenizer = _bytes_tokenizer(
        cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return _save(BertModel, config, tokenizer, folder, seed)


def save_vit(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """A ViT for images of 16 x 16 with a head of two classes: 2 layers, hidden 32, 4 heads, patches of 4.

    `sizes` are ViTConfig's, in place of these.
    """
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )
    config.update(sizes)
    return _save(ViTForImageClassification, config, image_processor(), folder, seed)


def save_clip(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """A CLIP for images of 16 x 16 and texts of up to 48 bytes: towers of 2 layers, hidden 32, 4 heads.

    `sizes` are those of both towers, in place of these.
    """
    return _save_towers(
        CLIPModel, CLIPConfig, folder, seed, {"projection_dim": 24, "logit_scale_init_value": 1.5}, sizes
    )


def save_siglip(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """A SigLIP of the sizes of `save_clip`."""
    return _save_towers(SiglipModel, SiglipConfig, folder, seed, {}, sizes)


def _save_towers(model: Any, kind: Any, folder: Path, seed: int, more: dict[str, Any], sizes: dict[str, Any]) -> Path:
    tokenizer = _bytes_tokenizer(bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<pad>")
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<start>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=around
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = kind(
        text_config=tower | text | sizes, vision_config=tower | {"image_size": 16, "patch_size": 4} | sizes, **more
    )
    _save(model, config, tokenizer, folder, seed)
    image_processor().save_pretrained(folder)
    return folder


def image_processor() -> Any:
    """Makes images of 16 x 16, with values from -1 to 1."""
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def _save(model: Any, config: Any, tokenizer: Any, folder: Path, seed: int) -> Path:
    """Weights drawn by the seed, in transformers' own files."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _bytes_tokenizer(**special: str) -> Any:
    """One token per byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(special.values()), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special)
