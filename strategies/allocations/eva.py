"""EVA's ranks: those directions of the modules' inputs get a rank that explain most of the inputs' variance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..tools.budget import most_worth
from ..tools.inputs import STATISTIC, ask_for_inputs, shares, spectra
from .base import Allocation, Learned, Shapes, check_growth


@dataclass(frozen=True)
class EvaRanks(Allocation):
    """Rank i of a module is worth the share of its inputs' variance along direction i; the best ones are given.

    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    https://arxiv.org/abs/2410.07170, Section 3.3. The covariance is that of all clients' inputs together, from a round
    0 (see `lora.init = eva`, which may use the same round). Differences from the paper: every module has at least rank
    1, and the numbers in the factors stay within the client's budget too, not only the sum of the ranks.

    Args:
        growth: largest rank of a module, as a multiple of the client's own; the paper's rho, 2 in its experiments.
        width: columns of each sketch; 0: 8 for each of the rank.
    """

    growth: float = 2.0
    width: int = 0

    statistic: ClassVar[str] = STATISTIC

    def __post_init__(self) -> None:
        check_growth("eva", self.growth)

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The sketches of all modules' inputs."""
        return ask_for_inputs(adapter, client, self.width)

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """Module -> the shares of the variance along its directions, largest first."""
        return shares(spectra(replies))

    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """The most explained variance that the client affords."""
        values = {module: shares.tolist() for module, shares in learned.items()}

        def worth(module: str, rank: int) -> float:
            own = values.get(module, [])
            return own[rank] if rank < len(own) else 0.0

        return most_worth(client, shapes, worth, self.growth)
