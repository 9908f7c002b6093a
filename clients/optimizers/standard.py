"""The optimizers of torch and of bitsandbytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fedlora.common.errors import ConfigError
from fedlora.config import TrainConfig
from fedlora.models.trainable import Trainable

from .base import ClientOptimizer, Steps


class TorchSteps(Steps):
    """Steps of any torch optimizer: the gradients are clipped by their common norm, then the optimizer steps.

    A parameter group with a key "times" steps at that multiple of the rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float) -> None:
        self._optimizer, self._parameters, self._clip = optimizer, parameters, clip

    def step(self, lr: float) -> None:
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1.0)
        self._optimizer.step()


@dataclass(frozen=True)
class _Torch(ClientOptimizer):
    """A client optimizer that is a torch optimizer."""

    @abstractmethod
    def make(self, parameters: Sequence[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
        """The torch optimizer over these parameters."""

    def begin(self, trained: Trainable, config: TrainConfig) -> Steps:
        made = self.make(trained.parameters, config.lr, config.weight_decay)
        return TorchSteps(made, trained.parameters, config.clip)


@dataclass(frozen=True)
class AdamW(_Torch):
    """torch's AdamW, with decoupled weight decay, https://arxiv.org/abs/1711.05101."""

    shares_batch: ClassVar[bool] = True

    def make(self, parameters: Sequence[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)


@dataclass(frozen=True)
class Sgd(_Torch):
    """Plain stochastic gradient descent, without momentum."""

    shares_batch: ClassVar[bool] = True

    def make(self, parameters: Sequence[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay)


_BASES = {"adamw": AdamW(), "sgd": Sgd()}
Base = Literal["adamw", "sgd"]


def over(parameters: Sequence[nn.Parameter], config: TrainConfig, base: Base = "adamw", *, clip: float) -> Steps:
    """The steps of torch's AdamW or SGD over these parameters, under another optimizer's changes of the gradients.

    Args:
        parameters: any number; with none, a step does nothing.
        config: the run's section train.
        base: which of the two.
        clip: as `train.clip`, in its place.
    """
    if not parameters:
        return _NoSteps()
    return TorchSteps(_BASES[base].make(parameters, config.lr, config.weight_decay), parameters, clip)


class _NoSteps(Steps):
    def step(self, lr: float) -> None:
        pass


@dataclass(frozen=True)
class _OnCuda(_Torch):
    """An optimizer of bitsandbytes, for CUDA GPUs only.

    Its state is quantized in blocks, https://arxiv.org/abs/2110.02861, or is in pageable memory. Clients do not share a
    batch: bitsandbytes gives a parameter that is not contiguous a contiguous copy of its data, and a client's view of
    the B of all clients would be a view no longer.
    """

    name: ClassVar[str]
    cls: ClassVar[str]

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"train.optimizer = {self.name!r} needs a CUDA GPU, but the model is on {device}; use adamw"
            )

    def make(self, parameters: Sequence[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
        self.check(parameters[0].device)
        from bitsandbytes import optim

        return getattr(optim, self.cls)(parameters, lr=lr, weight_decay=decay)


@dataclass(frozen=True)
class AdamW8bit(_OnCuda):
    """AdamW with its moments in 8 bits."""

    name: ClassVar[str] = "adamw-8bit"
    cls: ClassVar[str] = "AdamW8bit"


@dataclass(frozen=True)
class PagedAdamW(_OnCuda):
    """AdamW with its moments in pageable memory."""

    name: ClassVar[str] = "paged-adamw"
    cls: ClassVar[str] = "PagedAdamW"


@dataclass(frozen=True)
class PagedAdamW8bit(_OnCuda):
    """AdamW with its moments in 8 bits and in pageable memory."""

    name: ClassVar[str] = "paged-adamw-8bit"
    cls: ClassVar[str] = "PagedAdamW8bit"
