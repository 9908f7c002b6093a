"""A weighted sum of updates, recovered from weighted sums of their sketches. All sketches have one size, at any rank.

Notation: dW_k [d_out, d_in] is client k's update, `ideal = sum_k p_k dW_k`, s the sketch's width, and t = 8 a number of
columns that are held back. Omega [d_in, s + t] and Psi [2 s + 1, d_out] are drawn by a seed, the same on every machine.

One pass: a client sends `Y_k = dW_k Omega` and `Z_k = Psi dW_k`. Both are linear in dW_k, so that their weighted sums Y
and Z are the sketches of the ideal. With Q an orthonormal basis of the first s columns of Y, `ideal ~ Q (Psi Q)^+ Z`.
Tropp, Yurtsever, Udell and Cevher 2017, "Practical Sketching Algorithms for Low-Rank Matrix Approximation",
https://arxiv.org/abs/1609.00048, whose advice on sizes gives Psi its 2 s + 1 rows.

Two passes: a client sends Y_k, gets Q, and sends `P_k = dW_k' Q` [d_in, s]. With P = sum_k p_k P_k, `ideal ~ Q P'`.
Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", https://arxiv.org/abs/0909.4061; its use in
federated LoRA is FedASK's, https://arxiv.org/abs/2507.09990.

Both are exact where s is at least the ideal's rank, which is at most the sum of the clients' ranks. Below that, two
passes give the projection of the ideal on Q, and one pass comes near to it. The columns of Omega and the rows of Psi
are orthonormal, so that no sketch is longer than dW_k. The papers take Gaussian ones.

Where the matrix itself has no more numbers than its sketches, a client sends dW_k as it is, and nothing is lost.

Q knows nothing of the t columns that are held back. What the recovered sum misses there says what was lost: a sketch
for this alone is in Tropp et al. 2019, "Streaming Low-Rank Matrix Approximation with an Application to Scientific
Simulation", https://arxiv.org/abs/1902.08651.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lowrank
from .algebra import leading
from .state import LoraFactors

HELD_BACK = 8
Shape = tuple[int, int]
# What is dropped at the end of a recovered update's spectrum, as a share of its norm: the rounding of the sketches.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sketch:
    """How updates are sketched in one round.

    Args:
        width: s, at least 1.
        passes: 1 or 2.
        seed: what Omega and Psi are drawn from.
        rank: the number of rows to which s_k A_k, and of columns to which B_k, are filled up with zeros, for methods
            that need their means besides; 0: these are not sent.
    """

    width: int
    passes: int
    seed: int
    rank: int = 0

    @property
    def columns(self) -> int:
        """The number of columns of Omega, with those held back."""
        return self.width + HELD_BACK

    @property
    def rows(self) -> int:
        """The number of rows of Psi."""
        return 2 * self.width + 1

    def whole(self, shape: Shape) -> bool:
        """Whether a module's update is sent as the matrix that it is, which has no more numbers than its sketches.

        Args:
            shape: (d_out, d_in).
        """
        d_out, d_in = shape
        second = self.rows if self.passes == 1 else self.width
        return d_out * self.columns + second * d_in >= d_out * d_in

    def first(self, shape: Shape) -> dict[str, Shape]:
        """The shapes of what a client sends of a module after training, by name."""
        if self.passes == 1:
            return self._sums(shape)
        return {} if self.whole(shape) else {"Y": (shape[0], self.columns)}

    def second(self, shape: Shape) -> dict[str, Shape]:
        """The shapes of what it sends of a module in the second pass, if there is one."""
        return {} if self.passes == 1 else self._sums(shape)

    def _sums(self, shape: Shape) -> dict[str, Shape]:
        d_out, d_in = shape
        found: dict[str, Shape] = {}
        if self.whole(shape):
            found["D"] = shape
        elif self.passes == 1:
            found |= {"Y": (d_out, self.columns), "Z": (self.rows, d_in)}
        else:
            found["P"] = (d_in, self.width)
        return found | ({"A": (self.rank, d_in), "B": (d_out, self.rank)} if self.rank else {})


def sketched(
    factors: LoraFactors, names: Mapping[str, Shape], sketch: Sketch, basis: Tensor | None = None
) -> dict[str, Tensor]:
    """What a client sends of one module, in fp32.

    Args:
        factors: of the module, of a rank that is at most `sketch.rank` unless that is 0.
        names: what is to be sent, by `Sketch.first` or `Sketch.second`.
        sketch: the round's.
        basis: Q [d_out, s], for P alone.
    """
    B, A = factors.B.double(), factors.scaling * factors.down.double()
    found: dict[str, Tensor] = {}
    for name, shape in names.items():
        if name == "Y":
            found[name] = B @ (A @ omega(sketch, A.shape[1]).to(A))
        elif name == "Z":
            found[name] = (psi(sketch, B.shape[0]).to(B) @ B) @ A
        elif name == "P" and basis is not None:
            found[name] = A.T @ (B.T @ basis.to(B))
        elif name == "D":
            found[name] = B @ A
        else:
            found[name] = torch.zeros(shape, dtype=torch.float64, device=A.device)
            if name == "A":
                found[name][: len(A)] = A
            else:
                found[name][:, : len(A)] = B
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def basis_of(Y: Tensor, sketch: Sketch) -> Tensor:
    """Q [d_out, s]: an orthonormal basis that contains the range of Y without the columns held back; fp64."""
    return torch.linalg.qr(Y[:, : sketch.width].double()).Q


@dataclass(frozen=True)
class Recovered:
    """A module's ideal, from sums.

    Args:
        factors: of scaling 1, strongest component first, in fp32; their rank is the number of components that are more
            than the sketches' rounding, and at least 1.
        lost: an unbiased estimate of `|ideal - recovered|_F^2`.
        energy: an estimate of `|ideal|_F^2`, exact where nothing is lost. In two passes it is what was recovered and
            `lost`, which are orthogonal. In one pass it is what was recovered alone: with 2 s + 1 rows in Psi, that
            is by its error too large as much as what is lost makes the ideal larger.
    """

    factors: LoraFactors
    lost: float
    energy: float


def recover(sums: Mapping[str, Tensor], sketch: Sketch, basis: Tensor | None = None) -> Recovered:
    """The ideal of one module from the weighted means of what the clients sent.

    Args:
        sums: Y and Z, or in two passes Y and P, or D alone; in fp64.
        sketch: the round's.
        basis: the Q that the clients got, for two passes.
    """
    if "D" in sums:
        D = sums["D"].double()
        return Recovered(_known(lowrank.of_matrix(D)), 0.0, float(D.square().sum()))
    Y = sums["Y"].double()
    d_in = (sums["Z"].T if basis is None else sums["P"]).shape[0]
    tests = Y[:, sketch.width :]
    if basis is None:
        Q = basis_of(Y, sketch)
        X = torch.linalg.lstsq(psi(sketch, len(Y)).to(Q) @ Q, sums["Z"].double()).solution
        missed = tests - Q @ (X @ omega(sketch, d_in)[:, sketch.width :].to(X))
    else:  # Q went through fp32; the clients of the second pass may be fewer
        Q = basis.double()
        X = torch.linalg.solve(Q.T @ Q, sums["P"].double().T)
        missed = tests - Q @ torch.linalg.lstsq(Q, tests).solution
    u, s, vh = torch.linalg.svd(X, full_matrices=False)
    lost = (d_in - sketch.width) / HELD_BACK * float(missed.square().sum())
    energy = float(s.square().sum())
    return Recovered(_known((Q @ u, s, vh)), lost, energy if basis is None else energy + lost)


def loss(parts: Mapping[str, Recovered]) -> float:
    """An estimate of `|ideal - recovered|_F / |ideal|_F` over all modules.

    The first s columns of Omega contribute nothing to the difference, in one pass and in two: there, recovered and
    ideal agree. What is held back is a random direction among the other d_in - s. With 8 of them, the estimate of one
    module's loss is off by a factor of about 1.3 at worst if the loss is one component, and less the more there are.
    """
    energy = sum(part.energy for part in parts.values())
    lost = sum(part.lost for part in parts.values())
    return math.sqrt(lost / energy) if energy else 0.0


def size(sketches: Mapping[str, Tensor], sketch: Sketch, shape: Shape) -> float:
    """An estimate of |dW|_F from one client's sketches Y, Z, D or P of it: the largest that any of them gives.

    Args:
        sketches: of the update, or of the difference of two.
        sketch: the round's.
        shape: (d_out, d_in).
    """
    d_out, d_in = shape
    scale = {"Y": d_in / sketch.columns, "Z": d_out / sketch.rows, "D": 1.0, "P": 1.0}
    sizes = [scale[name] * float(t.double().square().sum()) for name, t in sketches.items() if name in scale]
    return math.sqrt(max(sizes, default=0.0))


def seed_of(seed: int, number: int) -> int:
    """What Omega and Psi are drawn from in a round.

    Args:
        seed: of the run.
        number: of the round.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/sketch/{number}".encode()).digest()[:6])


def omega(sketch: Sketch, d_in: int) -> Tensor:
    """Omega [d_in, s + t], orthonormal columns; those held back are the last. Shared: must not be changed."""
    return _orthonormal("omega", sketch.seed, d_in, sketch.columns)


def psi(sketch: Sketch, d_out: int) -> Tensor:
    """Psi [2 s + 1, d_out], orthonormal rows. Shared: must not be changed."""
    return _orthonormal("psi", sketch.seed, d_out, sketch.rows).T


@functools.lru_cache(maxsize=8)
def _orthonormal(name: str, seed: int, rows: int, columns: int) -> Tensor:
    """Uniformly distributed orthonormal columns in fp64, equal on all machines to fp64's rounding.

    Uniform numbers by the bits of SHAKE-256 become Gaussian by the inverse of their distribution. The Q of their QR,
    with the signs of R's diagonal, does not depend on how QR is computed.
    """
    octets = hashlib.shake_256(f"{seed}/{name}/{rows}x{columns}".encode()).digest(4 * rows * columns)
    drawn = torch.frombuffer(bytearray(octets), dtype=torch.uint8).reshape(-1, 4).double()
    uniform = (drawn @ torch.tensor([256.0**i for i in range(4)], dtype=torch.float64) + 0.5) / 256.0**4
    gaussian = (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).reshape(rows, columns)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _known(svd: lowrank.Svd) -> LoraFactors:
    """The components of an SVD without the last ones, which together are rounding."""
    _, s, _ = svd
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of what is lost without component i and those after it
    return leading(svd, max(1, int((tails > _ROUNDING * tails[0]).sum())))
