"""Figures of results: the final metric, the sweep of learning rates, and the metrics of single clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from ...comparison.ranking import Row, lower_is_better
from ..view import View
from .drawing import Picture, axes, legend
from .series import client_metric, client_scores, spread


def final(view: View) -> list[Picture]:
    """The test metric by strategy: each seed, mean and deviation; baselines as lines."""
    rows = _by_mean(view)
    if not rows:
        return []
    figure, ax = axes(height=_height(len(rows)))
    data: list[tuple[object, ...]] = []
    for y, row in enumerate(rows):
        style, values = view.styles[row.label], list(row.values.values())
        ax.scatter(
            values, [y + 0.27] * len(values), s=11, facecolors="none", edgecolors=style.color, linewidths=0.8, zorder=2
        )
        ax.errorbar(
            fmean(values),
            y,
            xerr=row.sd,
            capsize=3,
            zorder=3,
            **{**style.plot, "linestyle": "none", "markersize": style.plot["markersize"] + 2},
        )
        data += [(row.label, "strategy", row.choice.lr, seed, value) for seed, value in row.values.items()]
    for row in view.baselines:
        style, (mean, sd, n) = view.styles[row.label], spread(row.values.values())
        ax.axvline(mean, color=style.color, linestyle=style.line, lw=1.2, label=_with_sd(row.label, mean, sd, n))
        if sd:
            ax.axvspan(mean - sd, mean + sd, color=style.color, alpha=0.08, lw=0)
        data += [(row.label, "baseline", row.choice.lr, seed, value) for seed, value in row.values.items()]
    _name_axis(ax, [row.label for row in rows])
    ax.set_xlabel(f"{view.metric} on test rows ({'lower' if lower_is_better(view.metric) else 'higher'} is better)")
    legend(figure, ax)
    return [
        Picture(
            f"final-{view.slug}",
            f"Final {view.metric} on test rows",
            f"Small rings are seeds, the filled marker is their mean, {view.spread_note}; the best mean is at the top. "
            "Upright lines are baselines.",
            figure,
            ("label", "role", "lr", "seed", view.metric),
            data,
        )
    ]


def sweep(view: View) -> list[Picture]:
    """The validation metric by learning rate, the chosen one ringed."""
    shown = [row for row in (*view.strategies, *view.baselines) if len(_known(row)) > 1]
    if not shown:
        return []
    figure, ax = axes(height=max(3.6, 0.185 * len(shown) + 0.5))
    data: list[tuple[object, ...]] = []
    rates: set[float] = set()
    for row in shown:
        style, known = view.styles[row.label], _known(row)
        rates |= {lr for lr, _ in known}
        ax.plot(
            [lr for lr, _ in known],
            [value for _, value in known],
            **style.plot,
            label=row.label,
        )
        best = [(lr, value) for lr, value in known if lr == row.choice.lr]
        ax.scatter(*zip(*best, strict=True), s=110, facecolors="none", edgecolors=style.color, linewidths=1.2)
        for rate in row.choice.rates:
            chosen = rate.lr == row.choice.lr
            value = "" if rate.validation is None else rate.validation
            data.append((row.label, rate.lr, value, len(rate.seeds), len(rate.failed), chosen))
    ax.set_xscale("log")
    ticks = sorted(rates)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    ax.set(xlabel="learning rate", ylabel=f"{view.metric} on validation rows")
    legend(figure, ax)
    return [
        Picture(
            f"sweep-{view.slug}",
            f"{view.metric.capitalize()} by learning rate",
            "Means over seeds on validation rows; the ring marks the rate that was chosen. A ring at an end of the "
            "sweep means that a better rate may lie beyond it.",
            figure,
            ("label", "lr", f"validation-{view.metric}", "seeds", "failed", "chosen"),
            data,
        )
    ]


def fairness(view: View) -> list[Picture]:
    """Each client's test metric by strategy, the worst marked."""
    rows = [*_by_mean(view), *view.baselines]
    metric = client_metric((cell for row in rows for cell in row.choice.cells.values()), view.metric)
    if metric is None:
        return []
    scores: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for row in rows:
        known = [(seed, client_scores(cell, metric)) for seed, cell in row.choice.cells.items()]
        if any(found for _, found in known):
            scores[row.label] = [(seed, found) for seed, found in known if found]
    pick = max if lower_is_better(metric) else min
    figure, ax = axes(height=_height(len(scores)))
    for y, (label, found) in enumerate(scores.items()):
        style = view.styles[label]
        values = [value for _, one in found for value in one.values()]
        ax.scatter(values, [y] * len(values), s=16, color=style.color, alpha=0.35, linewidths=0, label="_")
        middle, worst = fmean(values), fmean(pick(one.values()) for _, one in found)
        ax.plot([middle, worst], [y, y], color=style.color, lw=0.8)
        ax.scatter([middle], [y], s=46, color=style.color, marker="|", linewidths=2)
        ax.scatter([worst], [y], s=46, facecolors="white", edgecolors=style.color, marker="D", linewidths=1.3, zorder=3)
    for marker, words, face in (
        ("o", "a client in one seed", "#777777"),
        ("D", "worst client, mean over seeds", "white"),
    ):
        ax.scatter([], [], s=30, marker=marker, facecolors=face, edgecolors="#555555", label=words)
    ax.scatter([], [], s=46, marker="|", color="#555555", linewidths=2, label="mean over clients")
    _name_axis(ax, list(scores))
    ax.set_xlabel(f"{metric} of a client on test rows ({'lower' if lower_is_better(metric) else 'higher'} is better)")
    legend(figure, ax)
    return [
        Picture(
            f"clients-{view.slug}",
            "How the clients fare",
            "The shorter a row, the more equal are the clients; the further on the good side, the better. The diamond "
            "is the worst client of each seed, mean over seeds.",
            figure,
            ("label", "seed", "client", metric),
            [
                (label, seed, name, value)
                for label, found in scores.items()
                for seed, one in found
                for name, value in one.items()
            ],
        )
    ]


def _known(row: Row) -> list[tuple[float, float]]:
    """Rates with a validation metric."""
    return [
        (rate.lr, rate.validation) for rate in row.choice.rates if rate.lr is not None and rate.validation is not None
    ]


def _by_mean(view: View) -> list[Row]:
    """Strategies, the best mean first."""
    sign = 1.0 if lower_is_better(view.metric) else -1.0
    return sorted(view.strategies, key=lambda row: sign * (row.mean or 0.0))


def _name_axis(ax: Axes, labels: Sequence[str]) -> None:
    """Labels on the y axis, the first at the top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.margins(x=0.08)


def _with_sd(label: str, mean: float, sd: float, n: int) -> str:
    return f"{label}: {mean:.4g} ± {sd:.2g}" if n > 1 else f"{label}: {mean:.4g}"


def _height(rows: int) -> float:
    return 0.26 * rows + 1.1
