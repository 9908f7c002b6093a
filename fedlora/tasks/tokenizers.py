"""Reads the tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.common.errors import ModelError

_FEW = 2  # some kinds of tokenizers have the mark of a word's beginning even without a file


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: it has no words. For many kinds of models, transformers makes such a tokenizer where the folder has
            no file of one, and every word is then the unknown token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    special = tokenizer.all_special_tokens
    if len(tokenizer) - len(special) < _FEW:
        raise ModelError(
            f"{folder}: its {type(tokenizer).__name__} has {len(special)} special tokens and no words, as if it "
            "were made without files; put the files of the model's tokenizer into this folder, such as tokenizer.json"
        )
    return tokenizer
