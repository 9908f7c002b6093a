"""LoRA+: AdamW with a larger rate for B than for A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.optim import AdamW

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps
from .pairs import whole_pairs
from .standard import TorchSteps


@dataclass(frozen=True)
class LoraPlus(ClientOptimizer):
    """AdamW with the rate `train.lr` for A and `ratio` times that for B.

    Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", https://arxiv.org/abs/2402.12354: with
    one rate for both factors, wide layers do not learn features efficiently; the paper recommends a ratio of about 16.
    All else that is trained has the rate `train.lr`, also a B whose A is frozen. The decoupled weight decay of B is
    multiplied too, since torch multiplies decay by the rate. Cost and state: those of AdamW.

    Args:
        ratio: rate of B / rate of A.
    """

    ratio: float = 16.0

    shares_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < float("inf"):
            raise ConfigError(
                f"train.optimizer-options: lora-plus's ratio = {self.ratio:g}, expected a number above 0, such as 16"
            )

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        fast = {id(pair.B) for pair in whole_pairs(trained, config)}
        groups = [
            {"params": [p for p in trained.parameters if (id(p) in fast) == faster], "times": times}
            for faster, times in ((False, 1.0), (True, self.ratio))
        ]
        made = AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        return TorchSteps(made, trained.parameters, config.clip)
