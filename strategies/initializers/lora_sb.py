"""LoRA-SB: fixed A and B along the leading directions of the first gradient, and a core R between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, leading, pad, stack, svd_each
from fedlora.adapters.algebra import whole_svd
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientUpdate

from ..tools.replies import gather
from .base import Initializer, Start


@dataclass(frozen=True)
class LoraSb(Initializer):
    """`dW = B R A`, with `-sum_k p_k G_k = U S V'` cut to rank r: B = U, A = V', and R = c diag(S).

    Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
    Fine-Tuning" (LoRA-SB), https://arxiv.org/abs/2411.19557. Of all first steps of its size and rank, R's start is the
    one along the gradient. Differences: LoRA-SB decomposes the sign of the mean gradient, which would need all of it,
    and not its directions alone; the size c comes from `first_step`. A module that no reply has counts as one without a
    gradient: R starts at 0 between orthonormal directions that no client chose. The scaling is 1 whatever `lora.alpha`
    says, since B has unit columns and A unit rows.
    Memory: all replies. Cost: O(d (K r)^2).

    Args:
        first_step: root of the mean square of the first update's entries; 1e-5, a usual learning rate of full
            fine-tuning, whose first Adam step moves every entry by that much. 0 starts at the base model.
    """

    first_step: float = 1e-5

    statistic: ClassVar[str] = "gradient"
    cores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.first_step < float("inf"):
            raise ConfigError(
                f"lora.init-options: lora-sb's first_step = {self.first_step}, expected a number of at least 0"
            )

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """Orthonormal A and B with the first R between them."""
        found, _ = gather(replies, 0)
        lora = dict(adapter.lora)
        descent = {
            name: replace(stack(found[name].factors, found[name].shares), scaling=-1.0)
            if name in found
            else LoraFactors(A=torch.zeros_like(f.A), B=torch.zeros_like(f.B), scaling=1.0)
            for name, f in lora.items()
        }
        for name, svd in svd_each(descent, max(f.rank for f in lora.values())).items():
            rank, d_out, d_in = lora[name].rank, lora[name].B.shape[0], lora[name].A.shape[1]
            # padded, so that the bases are whole where the replies have fewer directions than r
            u, s, vh = whole_svd(pad(leading(svd, rank, dtype=torch.float64), rank))
            size = float(s.norm())
            step = self.first_step * (d_out * d_in) ** 0.5 / size if size else 0.0
            core = torch.diag(step * s).float()
            missing = rank - len(core)
            lora[name] = LoraFactors(
                A=F.pad(vh, (0, 0, 0, rank - len(vh))).float(),
                B=F.pad(u, (0, rank - u.shape[1])).float(),
                scaling=1.0,
                R=F.pad(core, (0, missing, 0, missing)),
            )
        return Start(replace(adapter, lora=lora))
