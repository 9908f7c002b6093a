"""Differential privacy of whole clients for strategies of the ideal: sketches of their sum are given noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, norm, stack, to_fp32
from fedlora.adapters.sketched_sum import Sketch, basis_of, omega, seed_of
from fedlora.common.noise import Noise
from fedlora.exchange import Broadcast, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import SummedModule, SummedUpdate
from ..tools.shelf import Shelf
from .client_noise import ClientNoise, Released, change_of, clearness, length_of, noised, sent_by_name
from .distances import started_from
from .wrapper import innermost


@dataclass(frozen=True)
class ProductNoise(ClientNoise):
    """One sum for all: the ideal is the server's product plus `(sum_k c_k D_k + noise) / m`, recovered in two releases.

    D_k is what client k changed of a module's product, `s B A - s B_0 A_0`. It does not depend on how products are
    divided into factors, so that ranks may differ. `c_k = min(1, C / n_k)`, where n_k is the norm of all D_k and of
    what client k changed of tensors trained in full, as one vector. With Omega [d_in, w] of orthonormal columns:

        Y = sum_k c_k D_k Omega + N(0, (z C)^2)        Q: an orthonormal basis of Y
        P = sum_k c_k Q' D_k + N(0, (z C)^2)           the sum is Q P

    Neither Omega nor Q makes a matrix longer, so that without one client Y differs by at most C, and P by at most C for
    any Q: two releases of Gaussian noise in each round. The second has the tensors trained in full as well. For a
    strategy that needs the means of A and B, it has their changes too, and n_k counts these. A module that is no
    larger than w in one dimension is in the second release alone, as it is.

    The range finder is that of Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061; that both releases
    have bounded sensitivity follows as above. What lies outside of w directions is lost. A rank that a
    client lacks counts as unchanged. For the clip, the weights, the denominator m and the moving clip see
    `ClientNoise`.
    Memory: one reply; what the clients changed lies in a temporary folder between both releases. Cost: O(K d r w).

    Args:
        width: w; 0: the server's largest rank.
    """

    width: int = 0

    releases: ClassVar[int] = 2

    @classmethod
    def serves(cls, inner: Strategy) -> bool:
        """Whether the strategy can be given the ideal alone."""
        return innermost(inner).of_ideal and not inner.personal

    def _released(
        self,
        state: ServerState,
        sent: Broadcast,
        updates: Iterable[ClientUpdate],
        *,
        clip: float,
        deviation: float,
        noise: Noise,
    ) -> Released:
        whole = sent.plan.sent_back(sent.adapter)
        with_means = innermost(self.inner).needs_means
        width = self.width or max((f.rank for f in whole.lora.values()), default=1)
        sketch = Sketch(width, 2, seed_of(state.seed, sent.round))
        beside = {
            name: torch.zeros_like(tensor)
            for name, tensor in sent_by_name(sent.adapter, sent.plan).items()
            if with_means or name in whole.tensors
        }
        shapes = {name: (len(f.B), f.A.shape[1]) for name, f in whole.lora.items()}
        ranges = {
            name: torch.zeros(d_out, width, dtype=torch.float64)
            for name, (d_out, d_in) in shapes.items()
            if width < min(d_out, d_in)
        }
        within: list[bool] = []
        with TemporaryDirectory(prefix="fedlora-") as folder:
            shelf, waiting = Shelf(Path(folder)), list[Callable[[], ClientUpdate]]()
            for update in updates:
                products = changed_products(update)
                others = {name: t for name, t in change_of(update, sent.adapter).items() if name in beside}
                length = math.hypot(length_of(others), *map(norm, products.values()))
                within.append(length <= clip)
                share = self._share(update, length, clip)
                for name, tensor in others.items():
                    beside[name].add_(tensor, alpha=share)
                clipped = {name: replace(f, scaling=share * f.scaling) for name, f in products.items()}
                for name in ranges.keys() & clipped.keys():
                    ranges[name] += _times(clipped[name], omega(sketch, shapes[name][1])[:, :width])
                waiting.append(shelf.put(ClientUpdate(update.client_id, AdapterState(lora=clipped), num_examples=1)))
            noised(ranges, deviation, noise)
            bases = {name: basis_of(Y, sketch) for name, Y in ranges.items()}
            sums = {
                name: torch.zeros(width if name in bases else d_out, d_in, dtype=torch.float64)
                for name, (d_out, d_in) in shapes.items()
            }
            for take in waiting:
                for name, f in take().adapter.lora.items():
                    B = f.B.double()
                    sums[name] += f.scaling * (bases[name].T @ B if name in bases else B) @ f.A.double()
        noised(sums, deviation, noise)
        noised(beside, deviation, noise)
        released = {f"{name}.P": tensor for name, tensor in sums.items()} | beside
        moved = {name: tensor / self.clients for name, tensor in beside.items()}
        lora = {name: _sum(f, _factors(bases.get(name), sums[name] / self.clients)) for name, f in whole.lora.items()}
        modules = {
            name: SummedModule({f.rank: 1.0}, _mean(f, moved, name) if with_means else None)
            for name, f in whole.lora.items()
        }
        reply = SummedUpdate(
            client_id=0,
            adapter=AdapterState(lora=lora, tensors={n: tensor + moved[n] for n, tensor in whole.tensors.items()}),
            num_examples=1,
            base_version=sent.base_version,
            start=sent.adapter,
            modules=modules,
        )
        return Released(reply, within, clearness(released, deviation))


def changed_products(update: ClientUpdate) -> dict[str, LoraFactors]:
    """What a client changed of each module's update, as factors of scaling 1.

    `s B A - s_0 B_0 A_0 = B (s A - s_0 A_0) + (B - B_0) s_0 A_0`, in which nothing cancels where little has changed.

    Args:
        update: the reply, with A and B of each module at the ranks of its `start`.
    """
    begun, found = started_from(update), dict[str, LoraFactors]()
    for name, end in update.adapter.lora.items():
        start = begun.lora[name]
        A, before = end.scaling * to_fp32(end.A), start.scaling * to_fp32(start.A)
        B = to_fp32(end.B)
        if bool(start.B.any()):
            A, B = torch.cat([A - before, before]), torch.cat([B, B - to_fp32(start.B)], dim=1)
        found[name] = LoraFactors(A=A, B=B, scaling=1.0)
    return found


def _times(factors: LoraFactors, right: Tensor) -> Tensor:
    """dW right, in fp64."""
    return factors.scaling * factors.B.double() @ (factors.A.double() @ right)


def _factors(basis: Tensor | None, projected: Tensor) -> LoraFactors:
    """Q P as factors; without a basis, those of the matrix itself.

    Args:
        basis: Q [d_out, w].
        projected: P [w, d_in], or the matrix [d_out, d_in].
    """
    B, A = basis, projected
    if B is None:
        d_out, d_in = projected.shape
        B, A = (torch.eye(d_out), projected) if d_out <= d_in else (projected, torch.eye(d_in))
    return LoraFactors(A=A.float(), B=B.float(), scaling=1.0)


def _sum(start: LoraFactors, change: LoraFactors) -> LoraFactors:
    return stack([start, change]) if bool(start.B.any()) else change


def _mean(start: LoraFactors, moved: Mapping[str, Tensor], module: str) -> LoraFactors:
    """The factors that were sent and their mean change, at scaling 1."""
    return LoraFactors(
        A=start.scaling * (start.A + moved[f"{module}.A"]), B=start.B + moved[f"{module}.B"], scaling=1.0
    )
