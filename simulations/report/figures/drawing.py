"""Draws figures without a display: axes with room for a legend, and the files of a figure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "path.simplify": True,
}
# Fonts about as wide as DejaVu or narrower, in case it is missing.
_FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"


def _look(salt: str = "") -> Any:
    """Matplotlib's settings for these figures; the salt makes an SVG's ids unique, and the same each time."""
    settings: Any = {**_SETTINGS, "svg.hashsalt": salt or "fedlora"}
    return mpl.rc_context(settings)


@dataclass(frozen=True)
class Picture:
    """One figure, ready to be written.

    Args:
        name: name of the figure's files, without the ending.
        title: title above the figure.
        reading: one or two sentences on how to read the figure.
        figure: Matplotlib's figure.
        columns: titles of the columns of its data.
        rows: rows of its data, with everything that is drawn.
    """

    name: str
    title: str
    reading: str
    figure: Figure
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]


def axes(width: float = 8.0, height: float = 3.8, **more: Any) -> tuple[Figure, Axes]:
    """One pair of axes."""
    figure, grid = panels(1, width, height, **more)
    return figure, grid[0]


def panels(columns: int, width: float = 8.0, height: float = 3.8, **more: Any) -> tuple[Figure, list[Axes]]:
    """A row of axes; `more` goes to Matplotlib's `subplots`."""
    with _look():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, columns, squeeze=False, **more)
    return figure, list(grid[0])


def legend(figure: Figure, ax: Axes) -> None:
    """A legend of these axes on the right of all axes, which shrink for it."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = 1 + (len(handles) - 1) // 20
        with _look():
            figure.legend(handles, labels, loc="outside right upper", ncols=columns, handlelength=3.4)


def svg(picture: Picture) -> str:
    """The figure as an SVG element: the same bytes for the same data, and ids that no other figure has."""
    buffer = io.StringIO()
    with _look(picture.name):
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{picture.name}-", text)
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", _FONTS, text)
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag[0]), text)


def write(picture: Picture, folder: Path) -> str:
    """Write NAME.png, NAME.svg and NAME.csv, and return the SVG element."""
    drawn = svg(picture)
    (folder / f"{picture.name}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{drawn}', encoding="utf-8")
    with _look():
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=110, metadata={"Software": None})
    with (folder / f"{picture.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(picture.columns)
        writer.writerows(picture.rows)
    return drawn


def slug(text: str) -> str:
    """A label as part of a file name and of an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
