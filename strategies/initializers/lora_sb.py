"""LoRA-SB: A and B are fixed to the leading directions of the first gradient, with a core R between them."""

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
    """`dW = B R A` with B = U, A = V' and R = c diag(S), where `-sum_k p_k G_k = U S V'`, cut to rank r.

    Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
    Fine-Tuning" (LoRA-SB), https://arxiv.org/abs/2411.19557. G_k is the gradient of client k's loss by the weight W.
    The start of R makes the first update the step along the gradient of this rank and size. Differences from the paper:
    LoRA-SB decomposes the sign of the mean gradient, for which clients would have to send whole gradients instead of
    their leading directions; and c follows from `first_step`. For a module that no reply contains, R is 0, and A and B
    are arbitrary orthonormal directions. The scaling is 1 whatever `lora.alpha` says, since the columns of B and the
    rows of A have norm 1.
    Memory: all replies. Cost: O(d (K r)^2).

    Args:
        first_step: root of the mean square of the first update's entries. 1e-5 is a usual learning rate of full
            fine-tuning, where Adam's first step changes every entry by the learning rate. With 0, the run starts at
            the base model.
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
        """Orthonormal A and B, and the first R."""
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
            # padded, so that there are r orthonormal directions even if the replies have fewer
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
