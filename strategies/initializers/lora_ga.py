"""LoRA-GA: A and B along the leading directions of the mean gradient, and a fold that takes them away again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, leading, pad, stack, svd_each
from fedlora.adapters.algebra import whole_svd
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientUpdate

from ..tools.replies import gather
from .base import Initializer, Start


@dataclass(frozen=True)
class LoraGa(Initializer):
    """`A = c V_1'` and `B = c U_2`, where `sum_k p_k G_k = U S V'`, V_1 are its first r directions and U_2 the next r.

    Wang, Yu and Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", https://arxiv.org/abs/2407.05000,
    with the directions "ArB2r" and the scale "stable". G_k is the gradient of client k's loss by the weight W. The
    first step of plain gradient descent on A and B then changes W along the best approximation of the mean gradient of
    rank 2r. W itself stays as it is, and may be quantized: the fold `-s B A` beside it makes the run start at the base
    model. Differences from the paper: the mean gradient is that of all clients' r leading directions, instead of one
    client's whole gradient. A single client sends r directions, and B then has arbitrary orthonormal ones. A module
    that no reply contains starts as LoRA does. All clients need one rank: the fold takes the whole start away, of which
    a smaller client would have a part. A strategy that restarts its adapter uses the start in round 1 alone.
    Memory: all replies. Cost: O(d (K r)^2).

    Args:
        gamma: c = d_out^(1/4) / gamma^(1/2); 16 as in the paper.
    """

    gamma: float = 16.0

    statistic: ClassVar[str] = "gradient"
    unequal_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise ConfigError(f"lora.init-options: lora-ga's gamma = {self.gamma}, expected a number above 0")

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The factors, and the fold that is their negative."""
        found, _ = gather(replies, 0)
        gradients = {name: stack(part.factors, part.shares) for name, part in found.items()}
        lora, away = dict(adapter.lora), dict[str, LoraFactors]()
        for name, svd in svd_each(gradients, 2 * max(f.rank for f in lora.values())).items():
            rank, scaling = lora[name].rank, lora[name].scaling
            # padded, so that there are 2r orthonormal directions even if the replies have fewer
            u, _, vh = whole_svd(pad(leading(svd, 2 * rank), 2 * rank))
            size = u.shape[0] ** 0.25 / self.gamma**0.5
            A, B = size * vh[:rank], size * u[:, rank : 2 * rank]
            A, B = F.pad(A, (0, 0, 0, rank - len(A))).float(), F.pad(B, (0, rank - B.shape[1])).float()
            lora[name] = LoraFactors(A=A, B=B, scaling=scaling)
            away[name] = LoraFactors(A=A, B=B, scaling=-scaling)
        return Start(replace(adapter, lora=lora), folds=(AdapterState(lora=away),))
