"""The packaged model `fashion-mixer`: a small MLP-Mixer."""

from __future__ import annotations

from pathlib import Path

from fedlora.common.assets import Say
from fedlora.models.mixer import MlpMixerConfig, MlpMixerModel

from . import training

_RECIPE = training.Recipe(name="fashion-mixer", version="1", epochs=5)


def make(source: Path, folder: Path, say: Say) -> None:
    """Train the model on images of the set in `source`, and fill `folder`; see `training.make`."""
    training.make(_RECIPE, body, lambda tokens: tokens.mean(1), source=source, folder=folder, say=say)


def body() -> MlpMixerModel:
    """The untrained model: 4 blocks, hidden 96, patches of 7 x 7 pixels. An image is the mean of its tokens."""
    config = MlpMixerConfig(
        hidden_size=96,
        token_size=48,
        channel_size=384,
        num_hidden_layers=4,
        image_size=training.SIZE,
        patch_size=7,
    )
    return MlpMixerModel(config)
