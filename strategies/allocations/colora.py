"""CoLoRA's ranks: in proportion to what each module's update contributes to a lower loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import slice_adapter_for
from ..tools.questions import means_of, measured, question_for_tensors
from .proportional import Proportional


@dataclass(frozen=True)
class CoLora(Proportional):
    """Ranks in proportion to the integrated gradient along the way from the base model to a trained one (FAIG).

    Experimental: Park et al. 2024, "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image
    Restoration" (CoLoRA), https://arxiv.org/abs/2408.01099, is known here from notes: it turns contributions into ranks
    by a factor with two constants, which are not confirmed. Here the ranks are in proportion to the contributions, and
    those below 0 count as 0. Each client trains for a round 0 and integrates over its own way; the server takes the
    mean of the contributions, weighted by examples. The adapters trained in round 0 are dropped.

    Args:
        growth: largest rank of a module, as a multiple of the client's own.
    """

    statistic: ClassVar[str] = "contributions"

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The contributions of all modules, with LoRA's own start to train from."""
        shapes = {f"{module}.contribution": (1,) for module in adapter.lora}
        return question_for_tensors(self.statistic, adapter, shapes, start=slice_adapter_for(adapter, client))

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Module -> its mean contribution."""
        return measured(means_of(replies), "contribution")
