"""What a model is trained on: tokens, and the labels that the loss is taken of."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # torch's cross entropy leaves this label out


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Args:
        input_ids: tokens, at most `data.max-length`.
        labels: for a causal LM, each token itself where the loss is taken and -100 elsewhere (not shifted: the
            model shifts); for classification, the class.
        whole: how many tokens the row has.
        cut: what was cut to fit: nothing (empty); "turns", earlier ones of a conversation; "system", these and its
            system prompt; "inside", a part of its last question or answer; "end", of a text.
    """

    input_ids: list[int]
    labels: list[int] | int
    whole: int = 0
    cut: str = ""
