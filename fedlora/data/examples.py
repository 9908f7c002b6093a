"""What a model is trained on: an example's arrays by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# An array as torch and numpy read it: a number, a list of numbers, or a numpy array.
Values = Any


@dataclass(frozen=True, slots=True)
class Example:
    """One training example; what its arrays are is a matter of the task.

    Args:
        arrays: by name, such as `input_ids` and `labels`.
        whole: how many tokens the row has, before it is cut.
        cut: what was cut to fit: nothing (empty); "turns", earlier ones of a conversation; "system", these and its
            system prompt; "inside", a part of its last question or answer; "end", of a text.
    """

    arrays: Mapping[str, Values]
    whole: int = 0
    cut: str = ""

    def __getitem__(self, name: str) -> Values:
        """One array."""
        return self.arrays[name]

    @property
    def size(self) -> int:
        """The length of its longest array: examples of like size need little padding in one batch."""
        return max((len(values) for values in self.arrays.values() if has_length(values)), default=1)


def has_length(values: Values) -> bool:
    """Whether an array has a first axis, which examples of unequal length are padded along."""
    return isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0
