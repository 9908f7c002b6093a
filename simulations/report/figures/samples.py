"""The figure of some images of each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.patches import Rectangle

from .drawing import Picture, axes

_WIDE = 14  # largest number of signs of a caption, which stands below an image of this width
_PER_LINE = 8  # images of a client that stand side by side
_SIDE = 0.94  # of an image, where the next one begins at 1


@dataclass(frozen=True)
class Sample:
    """One image.

    Args:
        row: number of the row in the source, from 1.
        image: uint8 [height, width, 3].
        label: name or number of its class.
        group: value of the column `evaluate.by`; empty without one.
    """

    row: int
    image: np.ndarray
    label: str
    group: str = ""


@dataclass(frozen=True)
class Strip:
    """The images of one client; `name` is its natural key, empty for other partitions."""

    client: int
    name: str
    samples: Sequence[Sample]


def strips(clients: Sequence[Strip], column: str, more: str) -> Picture:
    """The images of each client side by side, each with its class and group below.

    Args:
        clients: the clients, at least one of which has an image.
        column: name of the column of the groups; empty without one.
        more: a further sentence on how to read the figure.
    """
    grouped = any(sample.group and sample.group != strip.name for strip in clients for sample in strip.samples)
    lines, what = (2, f"the class and the {column}") if grouped else (1, "the class")
    step = 1.16 + 0.16 * lines
    across = min(_PER_LINE, max(len(strip.samples) for strip in clients))
    places = [
        (strip, range(start, min(start + across, len(strip.samples))))
        for strip in clients
        for start in range(0, max(1, len(strip.samples)), across)
    ]
    unit = 7.6 / _PER_LINE  # inches
    figure, ax = axes(1.4 + unit * across, 0.2 + unit * step * len(places))
    for line, (strip, numbers) in enumerate(places):
        top = line * step
        if numbers.start == 0:
            name = f"client {strip.client}" + (f"\n{_short(strip.name)}" if strip.name else "")
            ax.text(-0.12, top + 0.5, name, ha="right", va="center", fontsize=8)
        for at, number in enumerate(numbers):
            sample = strip.samples[number]
            height, width = (_SIDE * side / max(sample.image.shape[:2]) for side in sample.image.shape[:2])
            left, above = at + (1 - width) / 2, top + (1 - height) / 2
            ax.imshow(sample.image, extent=(left, left + width, above + height, above), interpolation="none")
            ax.add_patch(Rectangle((left, above), width, height, fill=False, edgecolor="#cccccc", linewidth=0.5))
            words = _short(sample.label) + (f"\n{_short(sample.group)}" if grouped else "")
            ax.text(at + 0.5, top + 1.03, words, ha="center", va="top", fontsize=7)
    ax.set_xlim(-1.3, across + 0.05)
    ax.set_ylim(step * len(places), -0.05)
    ax.set_aspect("equal")
    ax.axis("off")
    rows = [
        (strip.client, strip.name, sample.row, sample.label, sample.group)
        for strip in clients
        for sample in strip.samples
    ]
    return Picture(
        "samples",
        "Images of each client",
        f"The first images of each client's rows, with {what} below.{more}",
        figure,
        ("client", "name", "row", "class", "group"),
        rows,
    )


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 1]}…"
