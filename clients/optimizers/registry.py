"""Client optimizers by name."""

from __future__ import annotations

import torch

from fedlora.common.registry import Registry
from fedlora.config import TrainConfig

from .base import ClientOptimizer

OPTIMIZERS = Registry(
    noun="client optimizer",
    key="train.optimizer",
    options_key="train.optimizer-options",
    base="fedlora.clients.optimizers.base:ClientOptimizer",
    method="begin",
    names={
        "adamw": "fedlora.clients.optimizers.standard:AdamW",
        "sgd": "fedlora.clients.optimizers.standard:Sgd",
        "adamw-8bit": "fedlora.clients.optimizers.standard:AdamW8bit",
        "paged-adamw": "fedlora.clients.optimizers.standard:PagedAdamW",
        "paged-adamw-8bit": "fedlora.clients.optimizers.standard:PagedAdamW8bit",
    },
)


def optimizer(config: TrainConfig) -> ClientOptimizer:
    """The optimizer that `train.optimizer` names, with its options.

    Raises:
        ConfigError: there is no such optimizer, or it has no such options.
    """
    return OPTIMIZERS.make(config.optimizer, config.optimizer_options)


def check(config: TrainConfig, device: torch.device) -> None:
    """Check that the optimizer that `train.optimizer` names exists and works on this device.

    Raises:
        ConfigError: it does not.
    """
    optimizer(config).check(device)
