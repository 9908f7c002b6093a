"""Classification from a frozen encoder's features: real labels and real texts, at milliseconds for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.common.errors import ConfigError
from fedlora.config import Config

from .base import Batch
from .classification import Classification
from .probed import LAYER, Probed

_SEED = 2  # of the readout, which is the same in every run


@dataclass(frozen=True)
class FrozenEncoder(Classification):
    """Predicting the class of a text from an encoder's features, through one hidden layer that alone is adapted.

    The logits are `C gelu((W_0 + dW) x)`, where x [d] is the mean of the encoder's last hidden states over a text's
    tokens, scaled to the norm sqrt(d). W_0 [width, d] is the layer `probe`, random with rows of norm 1, and C [labels,
    width] is a random readout with orthonormal rows. The encoder, W_0 and C are frozen and the same in every run, so
    that all that is learned is the adapter dW of `probe`. No head is trained, whose mean would be the same whatever the
    strategy. Each text is read once in a process.

    Args:
        labels: number of classes; set by `model.labels`.
        width: number of hidden units.
    """

    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    pipeline: ClassVar[str] = "feature-extraction"
    kind: ClassVar[str] = "encoder with a probe"

    width: int = 192

    def __post_init__(self) -> None:
        if self.width < max(self.labels, 1):
            raise ValueError(f"expected a width of at least model.labels = {self.labels}")

    def check_config(self, config: Config) -> None:
        super().check_config(config)
        if config.lora.target_modules != LAYER:
            raise ConfigError(
                f"model.task = 'frozen-encoder': lora.target-modules = {config.lora.target_modules!r}, expected "
                f"{LAYER!r}, since the encoder is frozen"
            )

    def auto_class(self) -> Any:
        return Probed

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": self.width}

    def logits(
        self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, targets, rows = super().logits(model, batch, adapters)
        return F.gelu(hidden) @ readout(self.labels, self.width).to(hidden).T, targets, rows


@lru_cache(maxsize=8)
def readout(labels: int, width: int) -> Tensor:
    """C, fp32 [labels, width]: orthonormal random rows, the same in every process."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(width, labels, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T.float()
