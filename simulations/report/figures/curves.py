"""Figures over rounds: the metric by round, by megabytes and by seconds, and the diagnostics by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from ..view import View, runs
from .drawing import Picture, axes, legend
from .series import Entry, Point, intruders, is_timed, points, score
from .style import Style

FLOOR = 1e-7
_ALONG = {
    "round": ("round", "by round"),
    "megabytes": ("megabytes sent, up and down (1 MB = 10⁶ bytes)", "by megabytes sent"),
    "seconds": ("seconds since the first round began", "by seconds"),
    "hours": ("hours of virtual time", "by virtual time"),
}
_COLUMNS = ("strategy", "round", "megabytes", "seconds", "mean", "sd", "seeds")
_TIMED = tuple("hours" if name == "seconds" else name for name in _COLUMNS)


def metric_curves(view: View) -> list[Picture]:
    """The metric by round, by megabytes and by seconds; by hours of virtual time where a run had a virtual clock."""
    lines = {row.label: points(runs(row), lambda entry: score(entry, view.metric)) for row in view.strategies}
    lines = {label: found for label, found in lines.items() if found}
    if not lines:
        return []
    pictures: list[Picture] = []
    timed = is_timed(run for row in view.strategies for run in runs(row))
    for along, (unit, words) in _ALONG.items():
        if along == "hours" and not timed:
            continue
        figure, ax = axes(height=_height(len(lines) + len(view.baselines)))
        for label, found in lines.items():
            draw_line(ax, label, found, view.styles[label], along=along)
        for row in view.baselines:
            values = [cell["scores"]["validation"][view.metric] for cell in row.choice.cells.values()]
            style = view.styles[row.label]
            ax.axhline(
                sum(values) / len(values), color=style.color, linestyle=style.line, lw=1.1, label=f"{row.label} (final)"
            )
        ax.set(xlabel=unit, ylabel=f"{view.metric} on validation rows")
        if along == "round":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, ax)
        pictures.append(
            Picture(
                f"metric-{along}-{view.slug}",
                f"{view.metric.capitalize()} {words}",
                f"Lines are means over seeds, {view.spread_note}; grey lines without markers are the baselines' "
                "final models. " + _MEANING[along],
                figure,
                _TIMED if along == "hours" else _COLUMNS,
                _rows(lines, "hours" if along == "hours" else "seconds"),
            )
        )
    return pictures


_MEANING = {
    "round": "Round 0 is the model before any training.",
    "megabytes": "Of two curves at the same height, the one further left needed fewer bytes.",
    "seconds": "Seconds are those of this machine, where clients share the hardware.",
    "hours": "Hours are those of the device traces, whatever this machine needed.",
}


def diagnostics(view: View) -> list[Picture]:
    """Aggregation error, effective rank, drift, the cosine of updates and intruder dimensions by round."""
    kinds: list[tuple[str, str, str, str, Callable[[Entry], float | None]]] = [
        (
            "aggregation-error",
            "Aggregation error by round",
            "relative error of the aggregate",
            "Distance of the server's result from the exact weighted mean of the clients' updates; values below 10⁻⁷ "
            "are rounding, and stand on the floor.",
            lambda entry: entry.get("aggregation-error"),
        ),
        (
            "effective-rank",
            "Effective rank by round",
            "effective rank (mean over modules)",
            "The number of directions that the mean update uses: the exponential of its singular values' entropy.",
            lambda entry: entry.get("effective-rank"),
        ),
        (
            "drift",
            "Drift between clients by round",
            "drift (0 to 1)",
            "0 if all clients' updates are equal, near 1 if the updates have nothing in common.",
            lambda entry: entry.get("drift"),
        ),
        (
            "update-cosine",
            "Cosine between clients' updates by round",
            "cosine",
            "1 where clients pull in one direction, 0 where they are at right angles, below 0 where they disagree.",
            lambda entry: entry.get("update-cosine"),
        ),
        (
            "intruders",
            "Intruder dimensions by round",
            "intruder dimensions (mean over modules)",
            "Number of leading directions of the tuned weights that are like no direction of the base model.",
            intruders,
        ),
    ]
    pictures: list[Picture] = []
    for name, title, unit, reading, value in kinds:
        lines = {row.label: points(runs(row), value) for row in view.strategies}
        lines = {label: found for label, found in lines.items() if found}
        if not lines:
            continue
        figure, ax = axes(height=_height(len(lines)))
        log = name == "aggregation-error"
        for label, found in lines.items():
            draw_line(ax, label, found, view.styles[label], floor=FLOOR if log else None)
        ax.set(xlabel="round", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            floor_axis(ax)
        legend(figure, ax)
        below = [label for label, points in lines.items() if max(point.mean for point in points) < FLOOR]
        floored = f" Never above the floor: {', '.join(below)}." if log and below else ""
        words = f"{reading}{floored} Lines are means over seeds, {view.spread_note}."
        pictures.append(Picture(f"{name}-{view.slug}", title, words, figure, _COLUMNS, _rows(lines)))
    return pictures


def draw_line(
    ax: Axes, label: str, found: Sequence[Point], style: Style, *, along: str = "round", floor: float | None = None
) -> None:
    """Draw means as a line with markers and, with several seeds, a band of one standard deviation.

    Args:
        ax: the axes to draw into.
        label: text for the legend.
        found: the points, at least one.
        style: style of the label.
        along: name of the attribute of Point on the x axis.
        floor: value at which smaller values are drawn.
    """
    least = float("-inf") if floor is None else floor
    x = [float(getattr(point, along)) for point in found]
    y = [max(point.mean, least) for point in found]
    ax.plot(
        x,
        y,
        **style.plot,
        markevery=max(1, len(x) // 12),
        label=label,
    )
    if any(point.sd for point in found):
        low = [max(point.mean - point.sd, least) for point in found]
        high = [max(point.mean + point.sd, least) for point in found]
        ax.fill_between(x, low, high, color=style.color, alpha=0.10, linewidth=0)


def floor_axis(ax: Axes) -> None:
    """Make an axis logarithmic, ending at a smallest value, which its label names."""
    ax.set_yscale("log")
    high = max([1.0, *[float(value) for line in ax.lines for value in line.get_ydata()]])  # type: ignore[union-attr]
    ax.set_ylim(FLOOR * 0.5, high * 1.5)
    ticks = [FLOOR * 10**power for power in range(8)]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.set_yticks(ticks, ["≤ 1e-7", *[f"1e{power}" for power in range(-6, 0)], "1"])


def _height(lines: int) -> float:
    """The height of a figure in inches, enough for the axes and for a legend of so many lines."""
    return max(3.6, 0.185 * min(lines, 20) + 0.5)


def _rows(lines: dict[str, list[Point]], time: str = "seconds") -> list[tuple[object, ...]]:
    return [
        (label, p.round, p.megabytes, getattr(p, time), p.mean, p.sd if p.n > 1 else "", p.n)
        for label, found in lines.items()
        for p in found
    ]
