"""Groups of a batch's rows, for inputs that the rows of a group share, and that go through the model once for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Groups:
    """The rows of a batch in equal parts, one after another. Each group has an adapter or a gradient of its own.

    The groups of a batch of clients are the clients; where each row has a gradient of its own, they are the rows.

    Attributes:
        count: number of groups.
        rows: number of rows of the batch.
        sizes: the numbers of rows that a layer may get: the batch's rows, or as many rows as they have tokens, and the
            same of inputs that are shared. In each of them, the groups are equal parts, one after another.
    """

    def __init__(self, count: int, rows: int, length: int) -> None:
        """The groups of a batch.

        Args:
            count: number of groups, by which the number of rows can be divided.
            rows: number of rows of the batch.
            length: number of tokens of its longest row.
        """
        self.count, self.rows, self.sizes = count, rows, {rows, rows * length}

    def share(self, rows: int, length: int) -> None:
        """Say that inputs are about to go through the model that the rows of a group share, such as names of classes.

        Args:
            rows: number of these inputs; each group has an equal part, one after another.
            length: number of tokens of the longest of them.
        """
        self.sizes |= {rows, rows * length}


_present: ContextVar[Groups | None] = ContextVar("groups", default=None)


def present() -> Groups | None:
    """The groups of the batch that goes through the model now; None if it is one group."""
    return _present.get()


@contextmanager
def grouped(groups: Groups) -> Iterator[None]:
    """Within the block, which is the forward pass of one batch, `present` returns these groups."""
    before = _present.set(groups)
    try:
        yield
    finally:
        _present.reset(before)
