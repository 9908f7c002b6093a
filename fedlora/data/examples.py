"""Training examples: arrays by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# An array that torch can read: a number, a list of numbers, or a numpy array.
Values = Any


@dataclass(frozen=True, slots=True)
class Example:
    """One training example. The task decides which arrays it has.

    Args:
        arrays: the arrays by name, such as `input_ids` and `labels`.
        whole: number of tokens of the whole row, before it was cut.
        cut: the kind of cut. Empty: nothing was cut; "turns": earlier turns of a conversation; "system": these and its
            system prompt; "inside": a part of its last question or answer; "end": the end of a text.
    """

    arrays: Mapping[str, Values]
    whole: int = 0
    cut: str = ""

    def __getitem__(self, name: str) -> Values:
        """The array of this name."""
        return self.arrays[name]

    @property
    def size(self) -> int:
        """The length of the longest array. Examples of similar size need little padding in one batch."""
        return max((len(values) for values in self.arrays.values() if has_length(values)), default=1)


def has_length(values: Values) -> bool:
    """Whether an array has a first axis, along which it can be padded, or is a single number."""
    return isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0
