"""Texts as vectors, by an encoder that was trained for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from fedlora.common.errors import ModelError
from fedlora.models import resolve
from fedlora.models.base.read import UNREADABLE, quiet
from fedlora.tasks.tokenizers import read_tokenizer

ENCODER = "minilm-l6"
_AT_ONCE = 32  # texts per forward pass
_LONGEST = 256  # tokens, as sentence-transformers cuts texts for this encoder


def embed(texts: Sequence[str], encoder: str = ENCODER) -> Tensor:
    """One row of norm 1 for each text: the mean of the encoder's last hidden states over the text's tokens.

    Args:
        texts: at least one.
        encoder: a packaged model, a local folder or a hub id.

    Raises:
        ModelError: there is no such model, or it is no encoder of texts.
    """
    folder = resolve(encoder)
    try:
        with quiet():
            tokenizer = read_tokenizer(folder)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
            means = [_means(model, tokenizer, texts[at : at + _AT_ONCE]) for at in range(0, len(texts), _AT_ONCE)]
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[:1]
        raise ModelError(
            f"{encoder}: cannot make vectors of texts: {reason}; name an encoder such as {ENCODER}"
        ) from error
    return torch.nn.functional.normalize(torch.cat(means), dim=1)


def _means(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the last hidden states over each text's tokens."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
    with torch.no_grad():
        hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)
