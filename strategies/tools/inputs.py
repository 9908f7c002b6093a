"""The spectra of modules' inputs, from sums and sketches that clients measured (statistic "inputs")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.sketches import sketcher
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .questions import means_of, measured, question_for_tensors

STATISTIC = "inputs"
_SPARE = 8  # columns of a sketch for each direction that is wanted


@dataclass(frozen=True)
class Spectrum:
    """The leading part of the covariance of a module's inputs.

    Args:
        shares: each direction's share of the whole variance, largest first, [k].
        directions: orthonormal rows, [k, d_in].
    """

    shares: Tensor
    directions: Tensor


def ask_for_inputs(adapter: AdapterState, client: ClientInfo, width: int) -> Broadcast:
    """The question for the sums and sketches of every module's inputs.

    Args:
        adapter: LoRA's own start.
        client: the client that gets the message.
        width: columns of a sketch; 0: 8 for each of the rank.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for module, factors in adapter.lora.items():
        d_in = factors.A.shape[1]
        wanted = width or _SPARE * factors.rank
        shapes[f"{module}.sketch"] = (d_in, min(wanted, d_in))
        shapes[f"{module}.sums"] = (2 * d_in + 1,)
    return question_for_tensors(STATISTIC, adapter, shapes)


def spectra(replies: Iterable[ClientUpdate]) -> dict[str, Spectrum]:
    """The spectra of all modules' inputs, as if all clients' inputs were in one place.

    Each client counts by its number of examples. The covariance is centred by the mean of all clients together.

    Args:
        replies: the clients' answers, read as they arrive.
    """
    means = means_of(replies)
    sums = measured(means, "sums")
    return {module: _spectrum(sketch, sums[module]) for module, sketch in measured(means, "sketch").items()}


def sizes(replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
    """Module -> the root mean square of each of its inputs, over all clients' inputs, [d_in]."""
    found: dict[str, Tensor] = {}
    for module, sums in measured(means_of(replies), "sums").items():
        d_in = len(sums) // 2
        found[module] = (sums[d_in:-1] / sums[-1].clamp(min=1e-30)).sqrt()
    return found


def _spectrum(sketch: Tensor, sums: Tensor) -> Spectrum:
    """By the Nystroem approximation `Y (O'Y)^-1 Y'` of C, with Y = C O, shifted so that the inverse is stable.

    Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
    https://arxiv.org/abs/1706.05736, Algorithm 3. A sketch as wide as the inputs is the covariance itself.
    """
    d_in, width = sketch.shape
    total, squares, count = sums[:d_in].double(), float(sums[d_in:-1].double().sum()), float(sums[-1])
    if not count > 0:
        return Spectrum(torch.zeros(0), torch.zeros(0, d_in))
    omega = sketcher(d_in, width).double()
    mean = total / count
    Y = sketch.double() / count - torch.outer(mean, mean @ omega)
    variance = max(squares / count - float(mean @ mean), 0.0)
    if width == d_in:
        values, vectors = torch.linalg.eigh((Y + Y.T) / 2)
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    else:
        shift = torch.finfo(torch.float32).eps * float(Y.norm())
        Y = Y + shift * omega
        inside = omega.T @ Y
        values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
        known = values > shift
        root = Y @ (vectors[:, known] / values[known].sqrt())
        left, s, _ = torch.linalg.svd(root, full_matrices=False)
        values, vectors = (s.square() - shift).clamp(min=0.0), left
    whole = variance or 1.0
    return Spectrum((values / whole).float(), vectors.T.float())


def shares(found: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """Module -> the shares of its directions."""
    return {module: spectrum.shares for module, spectrum in found.items()}
