"""Client optimizers by name."""

from __future__ import annotations

import logging

import torch

from fedlora.common.once import say_once
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
        "lora-plus": "fedlora.clients.optimizers.lora_plus:LoraPlus",
        "lora-rite": "fedlora.clients.optimizers.lora_rite:LoraRite",
        "lora-pro": "fedlora.clients.optimizers.lora_pro:LoraPro",
        "riemannian": "fedlora.clients.optimizers.riemannian:Riemannian",
        "allora": "fedlora.clients.optimizers.allora:Allora",
        "sam": "fedlora.clients.optimizers.sam:Sam",
        "glad": "fedlora.clients.optimizers.glad:Glad",
    },
)


def optimizer(config: TrainConfig) -> ClientOptimizer:
    """The optimizer that `train.optimizer` names, with its options. The log says once if it is experimental.

    Raises:
        ConfigError: there is no such optimizer, or it has no such options.
    """
    made: ClientOptimizer = OPTIMIZERS.make(config.optimizer, config.optimizer_options)
    if made.experimental:
        say_once(logging.WARNING, "train.optimizer = %s is experimental: %s", config.optimizer, made.experimental)
    return made


def check(config: TrainConfig, device: torch.device) -> None:
    """Check that the optimizer that `train.optimizer` names exists and works on this device.

    Raises:
        ConfigError: it does not.
    """
    optimizer(config).check(device)
