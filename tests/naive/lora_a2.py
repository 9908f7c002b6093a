"""LoRA-A2: all modules' whole factors, and a plain search for the rows that a client trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tests.naive.dense import mean

Rows = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Trained:
    """What one client ended with: whole factors, of which the chosen rows alone moved."""

    client: int
    examples: int
    rows: Rows
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]


class Server:
    def __init__(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        self.A = {name: a.double() for name, a in A.items()}
        self.B = {name: b.double() for name, b in B.items()}
        self.scaling = dict(scaling)
        self.importance: dict[tuple[int, str, int], float] = {}

    def select(self, client: int, own: Mapping[str, int], number: int) -> dict[str, list[int]]:
        """The best row of each module, and then the best that still fit, one by one."""
        queues = {name: self._queue(client, name, number) for name in self.A}
        rows = {name: [queue.pop(0)[1]] for name, queue in queues.items()}
        size = {name: self.A[name].shape[1] + self.B[name].shape[0] for name in self.A}
        left = sum(own.values()) - len(own)
        numbers = sum((own[name] - 1) * size[name] for name in own)
        while left:
            fitting = [name for name in rows if queues[name] and size[name] <= numbers]
            if not fitting:
                break
            places = list(rows)
            best = min(fitting, key=lambda name: (-queues[name][0][0], len(rows[name]), places.index(name)))
            rows[best].append(queues[best].pop(0)[1])
            left, numbers = left - 1, numbers - size[best]
        return {name: sorted(found) for name, found in rows.items()}

    def _queue(self, client: int, name: str, number: int) -> list[tuple[float, int]]:
        other = self.A[name] if number % 2 else self.B[name].T
        worth = [
            self.importance.get((client, name, row), float("inf")) if bool(other[row].any()) else -1.0
            for row in range(len(other))
        ]
        return sorted(zip(worth, range(len(worth)), strict=True), key=lambda pair: (-pair[0], pair[1]))

    def total(self, name: str) -> Tensor:
        return self.scaling[name] * self.B[name] @ self.A[name]

    def aggregate(self, parts: Sequence[Trained], number: int) -> None:
        before_a, before_b = self.A, self.B
        shares = [part.examples / sum(other.examples for other in parts) for part in parts]
        self.A = {n: mean([part.A[n] for part in parts], shares) for n in before_a}
        self.B = {n: mean([part.B[n] for part in parts], shares) for n in before_b}
        for part in parts:
            for name, rows in part.rows.items():
                for row in rows:
                    a, b = before_a[name][row], before_b[name][:, row]
                    moved = (part.B[name][:, row] - b) if number % 2 else (part.A[name][row] - a)
                    other = a if number % 2 else b
                    if bool(other.any()):
                        size = self.scaling[name] * float(moved.norm()) * float(other.norm())
                        self.importance[part.client, name, row] = size
