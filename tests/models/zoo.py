"""A zoo of tiny random models: distinct architectures made from their configs, and what each needs to be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from tests.tiny import _bytes_tokenizer

# Names of the usual sizes in most configs; a config takes those that it knows.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Species:
    """One architecture.

    Attributes:
        config: the config's class in transformers.
        model: the model's class, which saves the folder.
        task: as `model.task`.
        sizes: what its config calls the usual sizes, where it calls them otherwise, and what else it needs.
        targets: the leaf names of the modules that `auto` chooses.
        refused: what the sentence of refusal says; empty where the product serves it.
        read: what of the config transformers is told when the product's logits are compared with its own.
    """

    config: str
    model: str
    task: str = "causal-lm"
    sizes: dict[str, Any] = field(default_factory=dict)
    targets: str = ""
    refused: str = ""
    read: dict[str, Any] = field(default_factory=dict)


def save(species: Species, folder: Path, seed: int = 0) -> Path:
    """A folder with random weights and a byte-level tokenizer.

    Texts begin with a start token and end with an end token where the task is classification, as for BERT and BART.
    There is no dropout, so that training and evaluation compute the same.
    """
    tokenizer = _bytes_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if species.task == "classification":
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    config = _config(species, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, species.model)(config)
        with torch.no_grad():  # norms and biases that are 1 and 0 would hide mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1 and parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(species: Species, tokenizer: PreTrainedTokenizerBase) -> Any:
    kind = getattr(transformers, species.config)
    known = vars(kind())
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    names = kind.attribute_map
    usual = {name: value for name, value in _SIZES.items() if name in known or name in names}
    none = {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    return kind(**special | usual | none | species.sizes)


_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}

CAUSAL: dict[str, Species] = {
    "llama": Species("LlamaConfig", "LlamaForCausalLM", targets="q_proj v_proj"),
    "llama-tied": Species(
        "LlamaConfig", "LlamaForCausalLM", sizes={"tie_word_embeddings": True}, targets="q_proj v_proj"
    ),
    "gpt2": Species("GPT2Config", "GPT2LMHeadModel", targets="c_attn"),
    "gpt-bigcode": Species("GPTBigCodeConfig", "GPTBigCodeForCausalLM", targets="c_attn"),
    "gpt-neo": Species(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        sizes={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        targets="q_proj v_proj",
    ),
    "gpt-neox": Species("GPTNeoXConfig", "GPTNeoXForCausalLM", targets="query_key_value"),
    "gptj": Species("GPTJConfig", "GPTJForCausalLM", sizes={"rotary_dim": 4}, targets="q_proj v_proj"),
    "codegen": Species("CodeGenConfig", "CodeGenForCausalLM", sizes={"rotary_dim": 4}, targets="qkv_proj"),
    "opt": Species(
        "OPTConfig", "OPTForCausalLM", sizes={"ffn_dim": 64, "word_embed_proj_dim": 32}, targets="q_proj v_proj"
    ),
    "bloom": Species("BloomConfig", "BloomForCausalLM", targets="query_key_value"),
    "falcon": Species("FalconConfig", "FalconForCausalLM", targets="query_key_value"),
    "mistral": Species("MistralConfig", "MistralForCausalLM", targets="q_proj v_proj"),
    "mixtral": Species("MixtralConfig", "MixtralForCausalLM", sizes={"num_local_experts": 4}, targets="q_proj v_proj"),
    "qwen2": Species("Qwen2Config", "Qwen2ForCausalLM", targets="q_proj v_proj"),
    "qwen3": Species("Qwen3Config", "Qwen3ForCausalLM", targets="q_proj v_proj"),
    "qwen2-moe": Species(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        sizes={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        targets="q_proj v_proj",
    ),
    "qwen3-moe": Species(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        sizes={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        targets="q_proj v_proj",
    ),
    "olmoe": Species(
        "OlmoeConfig", "OlmoeForCausalLM", sizes={"num_experts": 4, "num_experts_per_tok": 2}, targets="q_proj v_proj"
    ),
    "gemma": Species("GemmaConfig", "GemmaForCausalLM", targets="q_proj v_proj"),
    "gemma2": Species("Gemma2Config", "Gemma2ForCausalLM", sizes={"sliding_window": 8}, targets="q_proj v_proj"),
    "gemma3": Species("Gemma3TextConfig", "Gemma3ForCausalLM", sizes={"sliding_window": 8}, targets="q_proj v_proj"),
    "phi": Species("PhiConfig", "PhiForCausalLM", targets="fc1 fc2 q_proj v_proj"),
    "phi3": Species("Phi3Config", "Phi3ForCausalLM", targets="qkv_proj"),
    "stablelm": Species("StableLmConfig", "StableLmForCausalLM", targets="q_proj v_proj"),
    "cohere": Species("CohereConfig", "CohereForCausalLM", targets="q_proj v_proj"),
    "olmo": Species("OlmoConfig", "OlmoForCausalLM", targets="q_proj v_proj"),
    "olmo2": Species("Olmo2Config", "Olmo2ForCausalLM", targets="q_proj v_proj"),
    "starcoder2": Species("Starcoder2Config", "Starcoder2ForCausalLM", targets="q_proj v_proj"),
    "granite": Species("GraniteConfig", "GraniteForCausalLM", sizes={"logits_scaling": 4.0}, targets="q_proj v_proj"),
    "mpt": Species(
        "MptConfig",
        "MptForCausalLM",
        sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        targets="Wqkv",
    ),
    "rwkv": Species(
        "RwkvConfig",
        "RwkvForCausalLM",
        sizes={"attention_hidden_size": 32, "rescale_every": 1},
        read={"rescale_every": 0},
        targets="key output receptance value",
    ),
    "mamba": Species(
        "MambaConfig", "MambaForCausalLM", sizes={"state_size": 4, "time_step_rank": 4}, targets="in_proj"
    ),
    "mamba2": Species(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        sizes={"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        targets="in_proj",
    ),
    "deepseek-v3": Species(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        sizes={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
            "num_key_value_heads": 4,
        },
        targets="kv_b_proj q_b_proj",
    ),
    "xglm": Species(
        "XGLMConfig",
        "XGLMForCausalLM",
        sizes={"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        targets="q_proj v_proj",
    ),
    "biogpt": Species("BioGptConfig", "BioGptForCausalLM", targets="q_proj v_proj"),
    "glm4": Species("Glm4Config", "Glm4ForCausalLM", targets="q_proj v_proj"),
    "recurrent-gemma": Species(
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        sizes={"num_hidden_layers": 3, "lru_width": 32},
        targets="q_proj v_proj",
    ),
    "jamba": Species(
        "JambaConfig",
        "JambaForCausalLM",
        sizes={
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        targets="q_proj v_proj",
    ),
    "bert-decoder": Species("BertConfig", "BertLMHeadModel", sizes={"is_decoder": True}, targets="query value"),
    "gemma3-images": Species(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        sizes={
            "text_config": {**_SIZES, "vocab_size": 260, "sliding_window": 8, "pad_token_id": 0},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 259,
            "boi_token_index": 258,
            "eoi_token_index": 257,
        },
        targets="q_proj v_proj",
    ),
    "llava": Species(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        sizes={
            "text_config": {"model_type": "llama", **_SIZES, "vocab_size": 260},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 16,
            },
            "image_token_index": 259,
        },
        refused="no causal language model of the kind Llava",
    ),
    "bert-mlm": Species(
        "BertConfig", "BertForMaskedLM", refused="BertLMHeadModel predicts a token from later ones too"
    ),
    "bart": Species("BartConfig", "BartModel", sizes=_BART, refused="an encoder and a decoder"),
    "t5": Species(
        "T5Config",
        "T5ForConditionalGeneration",
        sizes=_T5,
        refused="an encoder and a decoder",
    ),
    "vit": Species("ViTConfig", "ViTModel", refused="no causal language model of the kind ViT"),
    "xlnet": Species(
        "XLNetConfig",
        "XLNetLMHeadModel",
        sizes=_XLNET,
        refused="XLNetLMHeadModel predicts a token from later ones too",
    ),
}

CLASSIFIERS: dict[str, Species] = {
    "bert": Species("BertConfig", "BertModel", "classification", targets="query value"),
    "roberta": Species("RobertaConfig", "RobertaModel", "classification", targets="query value"),
    "distilbert": Species(
        "DistilBertConfig",
        "DistilBertModel",
        "classification",
        sizes={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        targets="q_lin v_lin",
    ),
    "albert": Species(
        "AlbertConfig", "AlbertModel", "classification", sizes={"embedding_size": 16}, targets="query value"
    ),
    "deberta-v2": Species(
        "DebertaV2Config",
        "DebertaV2Model",
        "classification",
        sizes={"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        targets="query_proj value_proj",
    ),
    "deberta": Species(
        "DebertaConfig",
        "DebertaModel",
        "classification",
        sizes={"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        targets="in_proj",
    ),
    "electra": Species(
        "ElectraConfig", "ElectraModel", "classification", sizes={"embedding_size": 16}, targets="query value"
    ),
    "bart": Species("BartConfig", "BartModel", "classification", sizes=_BART, targets="q_proj v_proj"),
    "modernbert": Species(
        "ModernBertConfig",
        "ModernBertModel",
        "classification",
        sizes={"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
        targets="Wqkv",
    ),
    "mpnet": Species("MPNetConfig", "MPNetModel", "classification", targets="q v"),
    "xlnet-classifier": Species(
        "XLNetConfig",
        "XLNetModel",
        "classification",
        sizes=_XLNET,
        refused="for a row changes by .* with padding",
    ),
    "t5": Species(
        "T5Config",
        "T5Model",
        "classification",
        sizes=_T5,
        targets="q v",
    ),
    "llama": Species("LlamaConfig", "LlamaModel", "classification", targets="q_proj v_proj"),
    "gpt2": Species("GPT2Config", "GPT2Model", "classification", targets="c_attn"),
    "funnel": Species(
        "FunnelConfig",
        "FunnelModel",
        "classification",
        sizes={"d_model": 32, "d_inner": 64, "n_head": 4, "d_head": 8, "block_sizes": [1, 1], "num_decoder_layers": 1},
        targets="q_head v_head",
    ),
    "longformer": Species(
        "LongformerConfig",
        "LongformerModel",
        "classification",
        sizes={"attention_window": 8},
        targets="query query_global value value_global",
    ),
}
