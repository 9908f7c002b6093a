"""The figure of a run's metrics by value of a column, such as the domains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from .curves import draw_line
from .drawing import Picture, legend, panels
from .series import points
from .style import KNOWN, Style

_MOST = 12  # largest number of lines that can be told apart


def by_round(run: Mapping[str, Any]) -> list[Picture]:
    """Accuracy and loss of each value by round; of many values, those that are worst after the last round."""
    last = next(entry["heldout-by"] for entry in reversed(run["rounds"]) if "heldout-by" in entry)
    metrics = [name for name in ("accuracy", "loss") if name in last["mean"]]
    if not metrics:
        return []
    worst_first = sorted(last["values"], key=lambda value: last["values"][value]["loss"], reverse=True)
    kept = {*worst_first[:_MOST]}
    shown = [value for value in last["values"] if value in kept]
    looks = dict(zip(shown, _looks(), strict=False))
    rows: list[tuple[object, ...]] = []
    figure, grid = panels(len(metrics), 9.0)
    for ax, metric in zip(grid, metrics, strict=True):
        for value in shown:
            found = points([run], lambda entry, v=value, m=metric: _of(entry, v, m))
            draw_line(ax, value, found, looks[value])
            rows += [(metric, value, point.round, point.mean) for point in found]
        ax.set(xlabel="round", ylabel=f"{metric} (nats)" if metric == "loss" else metric)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, grid[0])
    column = last["column"]
    more = (
        f" The {len(shown)} of {len(last['values'])} values whose loss is the largest."
        if len(kept) < len(last["values"])
        else ""
    )
    return [
        Picture(
            "by-value",
            f"{' and '.join(metrics).capitalize()} by {column} and round",
            f"Metrics of the held-out rows with each {column}; round 0 is the model before any training.{more}",
            figure,
            ("metric", column, "round", "value"),
            rows,
        )
    ]


def _of(entry: Mapping[str, Any], value: str, metric: str) -> float | None:
    return entry.get("heldout-by", {}).get("values", {}).get(value, {}).get(metric)


def _looks() -> list[Style]:
    """Styles that differ in colour and marker."""
    return [style for style in KNOWN.values() if style.marker not in "x+|"][:_MOST]
