"""What makes a model's inputs of images and of the prompts of classes: its image processor and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.common.errors import DataError, ModelError

from .by_image import read_image_processor
from .tokenizers import read_tokenizer


@dataclass(frozen=True, eq=False)
class ImageTextProcessor:
    """An image processor and a tokenizer.

    Args:
        images: the image processor.
        tokenizer: the tokenizer, with a pad token.
        longest: the most tokens of a text.
        whole: whether every text is filled up to `longest` tokens, padding that the model sees, as SigLIP was trained.
    """

    images: Any
    tokenizer: Any
    longest: int
    whole: bool

    def prompts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The tokens of texts as `prompts`, and as `mask` which of them the model sees; both int64 [texts, length].

        Raises:
            DataError: a text has more tokens than the model has positions.
        """
        filled = {"padding": "max_length", "max_length": self.longest} if self.whole else {"padding": True}
        found = self.tokenizer([*texts], **filled, return_attention_mask=True, return_tensors="np", verbose=False)
        ids, mask = (np.asarray(found[name], np.int64) for name in ("input_ids", "attention_mask"))
        if ids.shape[1] > self.longest:
            text = texts[int(mask.sum(1).argmax())]
            raise DataError(
                f"the prompt {text!r} has {mask.sum(1).max()} tokens, but the model has positions for at most "
                f"{self.longest}; shorten the name in data.label-names, or the template in model.task-options"
            )
        return {"prompts": ids, "mask": np.ones_like(mask) if self.whole else mask}

    def save_pretrained(self, folder: Any) -> None:
        """Write both, in the files from which `read` reads them."""
        self.images.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def read(folder: Path) -> ImageTextProcessor:
    """The image processor and the tokenizer in a model's folder.

    Raises:
        ModelError: the tokenizer has no words, does not belong to the model, or cannot pad.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, name = settings.text_config, type(settings).__name__
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model.name: its {type(tokenizer).__name__} has no pad token, which prompts of different lengths need; "
            "use the tokenizer that was saved with the model"
        )
    if beyond := [token for token, number in tokenizer.get_vocab().items() if number >= text.vocab_size]:
        raise ModelError(
            f"model.name: its {type(tokenizer).__name__} has {len(beyond)} tokens beyond the {text.vocab_size} of its "
            f"{name}, such as {beyond[0]!r}; use the tokenizer that was saved with the model"
        )
    whole = settings.model_type.startswith("siglip")
    return ImageTextProcessor(read_image_processor(folder), tokenizer, text.max_position_embeddings, whole)
