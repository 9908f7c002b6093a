"""Client optimizers by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig


def check(config: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError for an optimizer that this device cannot have."""
    if config.optimizer not in ("adamw", "sgd") and device.type != "cuda":
        raise ConfigError(
            f"train.optimizer = {config.optimizer!r} needs a CUDA GPU, the model is on {device}; use adamw"
        )


def make(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, over these parameters.

    adamw is torch's own (decoupled weight decay, https://arxiv.org/abs/1711.05101); 8bit and paged are
    bitsandbytes' block-wise quantized state (https://arxiv.org/abs/2110.02861) and state in pageable memory.

    Raises:
        ConfigError: a bitsandbytes optimizer without a CUDA GPU.
    """
    rate, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
    check(config, parameters[0].device)
    from bitsandbytes import optim

    kinds = {
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw": optim.PagedAdamW,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
    }
    return kinds[config.optimizer](parameters, lr=rate, weight_decay=decay)
