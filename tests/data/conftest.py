"""Small tokenizers, trained in place, so that no test needs a download."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["hello there, how are you today?\n\n", "I am fine, thank you!  \n    And you?\n", "Grüße 🙂\n"] * 20

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def wrap(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    """Pad token and end token are one, as in SmolLM2."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE; two newlines are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chatml(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    return wrap(byte_level, CHATML)


@pytest.fixture(scope="session")
def plain(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    return wrap(byte_level, None)


@pytest.fixture(scope="session")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words are marked by a leading bar, and the first piece of a text gets one too, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "system user assistant Be kind"], trainer)
    return wrap(tokenizer, CHATML)
