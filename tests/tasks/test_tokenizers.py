"""The tokenizer of a folder is read, and one that transformers makes where there is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.common.errors import ModelError
from fedlora.tasks.tokenizers import read_tokenizer


def test_the_tokenizer_of_a_folder_is_read(tiny_bert):
    assert read_tokenizer(tiny_bert).encode("good", add_special_tokens=False)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen2", "roberta", "t5"])
def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path, kind):
    folder = without(tmp_path / "model", kind)
    with pytest.raises(ModelError, match=r"special tokens and no words, .* put the files") as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)


def without(folder: Path, kind: str) -> Path:
    """A model's folder with a config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder
