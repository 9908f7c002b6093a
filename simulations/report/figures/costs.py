"""Figures of costs: bytes, seconds by phase, peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..view import View, runs
from .drawing import Picture, panels
from .series import entries, mean_bytes, phases

_PHASES = {
    "clients": ("#0072B2", ""),
    "aggregate": ("#D55E00", "////"),
    "encode": ("#E69F00", "...."),
    "decode": ("#F0E442", "xxxx"),
    "diagnose": ("#CC79A7", "\\\\\\\\"),
    "evaluate": ("#009E73", "----"),
    "save": ("#56B4E9", "++++"),
    "checkpoint": ("#999999", "||||"),
    "other": ("#DDDDDD", ""),
}


def cost(view: View) -> list[Picture]:
    """Bytes of a round, seconds of a round by phase, and peak memory, by strategy."""
    found: dict[str, dict[str, float]] = {}
    for row in view.strategies:
        numbers = [
            _numbers(entries(cell), run) for cell, run in zip(row.choice.cells.values(), runs(row), strict=False)
        ]
        keys = dict.fromkeys(key for one in numbers for key in one)
        found[row.label] = {key: fmean(one[key] for one in numbers if key in one) for key in keys}
    found = {label: one for label, one in found.items() if one}
    return [bars(f"cost-{view.slug}", found, "Means over rounds and seeds.")] if found else []


def bars(name: str, found: Mapping[str, Mapping[str, float]], words: str) -> Picture:
    """Side by side: megabytes up and down, seconds by phase, peak memory.

    Args:
        name: name of the picture.
        found: label of a bar -> its numbers: "up", "down" (megabytes), "seconds <phase>", "process", "gpu" (GiB).
        words: sentence about what the numbers are means over.
    """
    kinds = [kind for kind in (_bytes, _seconds, _memory) if any(kind(one) for one in found.values())]
    width = 8.0 + 0.6 * len(kinds)
    figure, grid = panels(len(kinds), width, 0.24 * len(found) + 2.0, sharey=True)
    for ax, kind in zip(grid, kinds, strict=True):
        parts = list(dict.fromkeys(part for one in found.values() for part in kind(one)))
        side = kind is not _seconds
        thick = 0.8 / len(parts) if side else 0.7
        starts = [0.0] * len(found)
        for i, part in enumerate(parts):
            widths = [kind(one).get(part, 0.0) for one in found.values()]
            color, hatch = _look(part, i)
            at = [y + (thick * (i - (len(parts) - 1) / 2) if side else 0.0) for y in range(len(found))]
            ax.barh(
                at,
                widths,
                thick,
                left=None if side else starts,
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=part,
                linewidth=0.0,
            )
            starts = [start + wide for start, wide in zip(starts, widths, strict=True)]
        ax.set_xlabel(_UNITS[kind])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3 if len(parts) > 2 else 2,
            fontsize=7,
            frameon=False,
            handlelength=1.6,
            columnspacing=1.0,
        )
    grid[0].set_yticks(range(len(found)), list(found))
    grid[0].set_ylim(len(found) - 0.4, -0.6)
    for ax in grid:
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    return Picture(
        name,
        "What a round costs",
        f"Megabytes (10⁶ bytes) of all clients together, seconds by phase on this machine, peak memory in GiB. {words}",
        figure,
        ("bar", "quantity", "value"),
        [(label, key, value) for label, one in found.items() for key, value in one.items()],
    )


def round_numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Bytes and seconds of one round, for `bars`."""
    return _numbers([entry], {})


def _numbers(rounds: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, part in (("upload-bytes", "up"), ("download-bytes", "down")):
        sent = mean_bytes(rounds, key)
        if sent is not None:
            numbers[part] = sent / 1e6
    numbers |= {f"seconds {name}": value for name, value in phases(rounds).items()}
    return numbers | {name: size / 2**30 for name, size in run.get("peak-memory-bytes", {}).items()}


def _bytes(one: Mapping[str, float]) -> dict[str, float]:
    return {part: one[part] for part in ("up", "down") if part in one}


def _seconds(one: Mapping[str, float]) -> dict[str, float]:
    named = {key.removeprefix("seconds "): value for key, value in one.items() if key.startswith("seconds ")}
    order = list(_PHASES)
    return dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _memory(one: Mapping[str, float]) -> dict[str, float]:
    return {part: one[part] for part in ("process", "gpu") if part in one}


_UNITS = {_bytes: "MB per round", _seconds: "seconds per round", _memory: "peak memory (GiB)"}


def _look(part: str, i: int) -> tuple[str, str]:
    pairs = [("#0072B2", ""), ("#E69F00", "////")]
    return _PHASES.get(part, pairs[i] if i < 2 else ("#777777", "oo"))
