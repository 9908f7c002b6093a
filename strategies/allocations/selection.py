"""Flexora and DiffoRA: only the layers or modules are trained that a search in round 0 found worth it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.layers import block_of
from fedlora.common.errors import ConfigError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import slice_adapter_for
from ..tools.questions import means_of, measured, question_for_tensors
from .base import Allocation, Learned, Shapes


@dataclass(frozen=True)
class Flexora(Allocation):
    """The layers with `alpha_l > 0` are trained, where alpha was trained by gradients on other rows than the adapter.

    Wei et al. 2024, "Flexora: Flexible Low-Rank Adaptation for Large Language Models",
    https://arxiv.org/abs/2408.10774. In a round 0 each client trains an adapter whose layers are multiplied by `L
    softmax(alpha)_l`, from alpha = 0, and steps alpha by Adam on its other examples, 8 batches for each step. The
    server takes the mean of the clients' alpha, weighted by examples, once, for the whole run. If no alpha is above 0,
    the layers with the largest one are trained. The adapters of round 0 are dropped, as in the paper. A module keeps
    the client's own rank. Cost of round 0: 9 passes for each step.
    """

    statistic: ClassVar[str] = "selection"

    def group(self, module: str) -> str:
        """What the module shares its alpha with."""
        return block_of(module) or module

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The alpha of all groups, with LoRA's own start to train from."""
        shapes = {f"{group}.alpha": (1,) for group in sorted({self.group(module) for module in adapter.lora})}
        return question_for_tensors(self.statistic, adapter, shapes, start=slice_adapter_for(adapter, client))

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Group -> its mean alpha."""
        return measured(means_of(replies), "alpha")

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """The client's own."""
        return {module: client.rank_of(module) for module in shapes}

    def modules(self, shapes: Shapes, learned: Learned) -> frozenset[str] | None:
        """Those of the groups that were chosen."""
        if not learned:
            return None
        chosen = self.chosen({group: float(value) for group, value in learned.items()})
        return frozenset(module for module in shapes if self.group(module) in chosen)

    def chosen(self, alpha: Mapping[str, float]) -> set[str]:
        """The groups that are trained."""
        return {group for group, value in alpha.items() if value > 0} or {max(alpha, key=lambda group: alpha[group])}


@dataclass(frozen=True)
class Diffora(Flexora):
    """The share `keep` of the modules, those with the largest alpha, is trained; `Flexora` module by module.

    Experimental: Jiang et al. 2025, "DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module
    Selection", https://arxiv.org/abs/2502.08905, is known here from its abstract: a differentiable matrix of adaptation
    chooses the modules. The search is Flexora's, module by module. In the paper, the modules that are left out share
    one adapter; here they have none.

    Args:
        keep: share of the modules that is trained, above 0 and at most 1.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"lora.allocation-options: diffora's keep = {self.keep}, expected above 0 and at most 1")

    def group(self, module: str) -> str:
        return module

    def chosen(self, alpha: Mapping[str, float]) -> set[str]:
        ordered = sorted(alpha, key=lambda module: -alpha[module])
        return {*ordered[: max(1, round(self.keep * len(ordered)))]}
