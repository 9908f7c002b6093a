"""MLP-Mixer as a model of transformers, which has none of its own (Tolstikhin et al. 2021, arXiv 2105.01601).

Importing this module registers the model type "mlp-mixer" with transformers' `AutoConfig`, `AutoModel` and
`AutoModelForImageClassification`, so that a folder that `save_pretrained` wrote is read like that of any other model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput


class MlpMixerConfig(PreTrainedConfig):
    """The sizes of an MLP-Mixer.

    Args:
        image_size: height and width of an image, in pixels; a multiple of `patch_size`.
        patch_size: height and width of a patch, in pixels. A patch is a token.
        num_channels: number of color channels.
        hidden_size: number of channels of a token.
        num_hidden_layers: number of blocks.
        token_size: width of the inner layer that mixes tokens.
        channel_size: width of the inner layer that mixes channels.
        layer_norm_eps: added to variances in layer norms.
        initializer_range: standard deviation of the linear layers' first weights.
    """

    model_type = "mlp-mixer"

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        token_size: int = 384,
        channel_size: int = 3072,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **others: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.token_size = token_size
        self.channel_size = channel_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**others)
        if image_size % patch_size:
            raise ValueError(f"image_size = {image_size} is no multiple of patch_size = {patch_size}")

    @property
    def tokens(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class MlpMixerBlock(GradientCheckpointingLayer):
    """Two residual steps on tokens [rows, tokens, channels]: one mixes tokens, channel by channel, and one channels."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.token_in = nn.Linear(config.tokens, config.token_size)
        self.token_out = nn.Linear(config.token_size, config.tokens)
        self.channel_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.channel_in = nn.Linear(config.hidden_size, config.channel_size)
        self.channel_out = nn.Linear(config.channel_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        across = self.token_norm(x).transpose(1, 2)  # the linear layers of tokens get [rows, channels, tokens]
        x = x + self.token_out(F.gelu(self.token_in(across))).transpose(1, 2)
        return x + self.channel_out(F.gelu(self.channel_in(self.channel_norm(x))))


class MlpMixerPreTrained(PreTrainedModel):
    """What transformers has to know of both models below."""

    config_class = MlpMixerConfig
    base_model_prefix = "mixer"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=cast("MlpMixerConfig", self.config).initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MlpMixerModel(MlpMixerPreTrained):
    """Images [rows, channels, height, width] to tokens [rows, tokens, hidden_size]."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(MlpMixerBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """See the class.

        Raises:
            ValueError: the images have another size than the model.
        """
        size = cast("MlpMixerConfig", self.config).image_size
        if pixel_values.shape[-2:] != (size, size):
            height, width = pixel_values.shape[-2:]
            raise ValueError(f"images of {height} x {width} pixels, expected {size} x {size}")
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class MlpMixerForImageClassification(MlpMixerPreTrained):
    """Images to the logits of classes, from the mean of the tokens."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        self.mixer = MlpMixerModel(config)
        self.classifier = nn.Linear(config.hidden_size, cast("int", config.num_labels))
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """See the class.

        Args:
            pixel_values: [rows, channels, height, width].
            labels: class numbers [rows]; with them, the output has the mean cross-entropy.
        """
        found = cast("Tensor", self.mixer(pixel_values).last_hidden_state)
        logits = self.classifier(found.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=cast("Any", loss), logits=logits)


AutoConfig.register("mlp-mixer", MlpMixerConfig, exist_ok=True)
AutoModel.register(MlpMixerConfig, MlpMixerModel, exist_ok=True)
AutoModelForImageClassification.register(MlpMixerConfig, MlpMixerForImageClassification, exist_ok=True)
