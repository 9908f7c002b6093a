"""The packaged model `fashion-vit`: a small vision transformer."""

from __future__ import annotations

from pathlib import Path

from transformers import ViTConfig, ViTModel

from fedlora.common.assets import Say

from . import training

_RECIPE = training.Recipe(name="fashion-vit", version="1", epochs=5)


def make(source: Path, folder: Path, say: Say) -> None:
    """Train the model on images of the set in `source`, and fill `folder`; see `training.make`."""
    training.make(_RECIPE, body, lambda tokens: tokens[:, 0], source=source, folder=folder, say=say)


def body() -> ViTModel:
    """The untrained model: 4 layers, hidden 96, patches of 7 x 7 pixels. Its first token stands for the image."""
    config = ViTConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=training.SIZE,
        patch_size=7,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)
