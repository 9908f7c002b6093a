"""A client's reply as one vector of numbers, the same for all clients of a round, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, keep_factors, without_values
from fedlora.adapters.flat import OWN
from fedlora.adapters.state import is_missing
from fedlora.common.errors import WireError

from .. import sketches
from ..messages import Broadcast

# Metrics that are summed behind the masks too, since they tell of a client's rows, and what each is divided by.
METRICS: Mapping[str, float] = MappingProxyType(
    {"train-loss": 1.0, "train-last-loss": 1.0, "train-cut": 1.0, "train-tokens": 2.0**20}
)
_BESIDE = 1 + len(METRICS)  # the weight, and these


def widened(adapter: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """The same update at scaling 1, with zeros in the rows and columns that a client of a smaller rank lacks.

    Args:
        adapter: factors that are sent, and tensors; factors that are not sent are empty.
        ranks: module -> the largest rank.

    Raises:
        WireError: a module has no rank there, or a larger one.
    """
    for name, f in adapter.lora.items():
        rank = len(f.R) if f.R is not None else f.B.shape[1] if is_missing(f.A) else f.rank
        if rank > ranks.get(name, 0):
            raise WireError(
                f"{name}: factors of rank {rank} have no place in a secure sum of rank {ranks.get(name, 0)}"
            )
    return AdapterState(lora={name: _wide(f, ranks[name]) for name, f in adapter.lora.items()}, tensors=adapter.tensors)


def asked(sent: Broadcast, ranks: Mapping[str, int]) -> AdapterState:
    """The names and shapes of what every client sends, in tensors without memory.

    Args:
        sent: a broadcast of the round.
        ranks: as in `Masking`.
    """
    if sent.plan.sketch:
        return sketches.asked(sent.plan, sent.adapter)
    back = keep_factors(sent.plan.sent_back(sent.adapter), sent.plan.send)
    return widened(without_values(back), ranks)


def count(like: AdapterState) -> int:
    """The number of words of a reply with tensors of these shapes."""
    return sum(tensor.numel() for tensor in OWN.put(like).values()) + _BESIDE


def to_vector(adapter: AdapterState, weight: float, metrics: Mapping[str, float]) -> NDArray[np.float64]:
    """The reply times its weight, [count].

    Args:
        adapter: all that is sent, in the shapes that all clients send.
        weight: in (0, 1]; the sum of all weights travels with the numbers.
        metrics: those of `METRICS` that may be told; 0 stands for others.
    """
    tensors = OWN.put(adapter)
    parts = [tensors[name].detach().cpu().double().flatten().numpy() for name in sorted(tensors)]
    beside = [1.0, *(metrics.get(name, 0.0) / unit for name, unit in METRICS.items())]
    return weight * np.concatenate([*parts, np.array(beside)])


def to_mean(total: NDArray[np.float64], like: AdapterState) -> tuple[AdapterState, dict[str, float]]:
    """The weighted mean of the replies, in fp64, and of their metrics.

    Args:
        total: the sum of what `to_vector` made.
        like: the names and shapes of a reply.
    """
    weight = total[-_BESIDE]
    means = torch.from_numpy(total / weight)
    shapes, place = OWN.put(like), 0
    found: dict[str, Tensor] = {}
    for name in sorted(shapes):
        size = shapes[name].numel()
        found[name] = means[place : place + size].reshape(shapes[name].shape)
        place += size
    metrics = {name: unit * float(mean) for (name, unit), mean in zip(METRICS.items(), means[place + 1 :], strict=True)}
    return OWN.get(found, dict.fromkeys(like.lora, 1.0)), metrics


def _wide(factors: LoraFactors, rank: int) -> LoraFactors:
    A, B, R = factors.A, factors.B, factors.R
    A = A if is_missing(A) else F.pad(factors.scaling * A, (0, 0, 0, rank - len(A)))
    B = B if is_missing(B) else F.pad(B, (0, rank - B.shape[1]))
    return LoraFactors(A=A, B=B, scaling=1.0, R=None if R is None else F.pad(R, (0, rank - len(R)) * 2))
