"""Tiny random models for fast tests: real architectures, real tokenizers, no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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
