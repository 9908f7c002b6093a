"""EVA: A along the directions in which the modules' inputs vary most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import AdapterState
from fedlora.common.errors import ConfigError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..tools.inputs import STATISTIC, ask_for_inputs, spectra
from .base import Initializer, Start


@dataclass(frozen=True)
class Eva(Initializer):
    """The rows of A are the first r principal components of the inputs of all clients together; B = 0.

    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    https://arxiv.org/abs/2410.07170, Algorithm 1. Clients send sums and sketches of their inputs in a round 0, whose
    mean over clients is that of their pooled inputs; only forward passes are needed, and weights are not read, so that
    they may be quantized. Differences from the paper: the covariance is sketched instead of updated batch by batch
    until the components stand still; and the ranks are the clients' own, unless `lora.allocation = eva` spreads them as
    the paper does. A module whose inputs vary in fewer directions has LoRA's own rows below them.
    A strategy that restarts its adapter uses the start in round 1 alone.
    Upload: width d_in numbers for each module, once. Cost: O(d width^2) for each module.

    Args:
        width: columns of each sketch; 0: 8 for each of the rank. A width of at least d_in sends the whole covariance.
        whiten: True divides each row by the standard deviation along it, scaled so that the first row keeps its norm.
    """

    width: int = 0
    whiten: bool = False

    statistic: ClassVar[str] = STATISTIC

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ConfigError(f"lora.init-options: eva's width = {self.width}, expected at least 1, or 0")

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The sketches of all modules' inputs."""
        return ask_for_inputs(adapter, client, self.width)

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The principal components, the largest first, so that a smaller client's rows are the best of its rank."""
        lora = dict(adapter.lora)
        for module, spectrum in spectra(replies).items():
            factors = lora[module]
            known = min(factors.rank, int((spectrum.shares > 0).sum()))
            rows, shares = spectrum.directions[:known], spectrum.shares[:known]
            if self.whiten and known:
                rows = rows * (shares[0] / shares).sqrt()[:, None]
            lora[module] = replace(factors, A=torch.cat([rows.to(factors.A), factors.A[known:]]))
        return Start(replace(adapter, lora=lora))
