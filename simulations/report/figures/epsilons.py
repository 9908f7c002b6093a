"""The final metric of scenarios that spend different amounts of privacy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from ..view import View
from .drawing import Picture, axes, legend
from .series import entries

_APART = 4.0  # how many times the largest epsilon the place of "no noise" is at


def by_epsilon(views: Sequence[View], cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    """The final metric of each strategy by the epsilon that was spent; none without two scenarios that differ in it.

    Args:
        views: the scenarios.
        cells: those of each scenario.
    """
    spent = {view.scenario: _spent(cells[view.scenario]) for view in views}
    known = sorted({epsilon for epsilon in spent.values() if epsilon})
    if len({epsilon or 0.0 for epsilon in spent.values()}) < 2 or not known:
        return []
    metric, right = views[0].metric, _APART * known[-1]
    figure, ax = axes(height=4.2)
    data: list[tuple[object, ...]] = []
    for label in dict.fromkeys(row.label for view in views for row in view.strategies):
        found = sorted(
            (spent[view.scenario] or right, fmean(row.values.values()), row.sd or 0.0, row.n)
            for view in views
            for row in view.strategies
            if row.label == label
        )
        look = next(view.styles[label] for view in views if label in view.styles)
        ax.errorbar(
            [x for x, _, _, _ in found],
            [mean for _, mean, _, _ in found],
            yerr=[sd for _, _, sd, _ in found],
            capsize=3,
            label=label,
            **look.plot,
        )
        data += [(label, "none" if x == right else x, mean, sd, n) for x, mean, sd, n in found]
    places = known + ([right] if None in spent.values() else [])
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{x:.2g}" if x in known else "no noise" for x in places])
    ax.set(xlabel="ε that was spent", ylabel=f"{metric} on test rows")
    legend(figure, ax)
    return [
        Picture(
            "epsilons",
            f"Final {metric} by ε",
            "Each strategy at the learning rate that was chosen for it at this ε; bars ± one standard deviation over "
            "seeds. A smaller ε promises more.",
            figure,
            ("strategy", "epsilon", metric, "sd", "seeds"),
            data,
        )
    ]


def _spent(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest epsilon after the last round of a scenario's runs, to two digits; None without noise."""
    ends = [rounds[-1].get("privacy", {}).get("epsilon") for cell in cells if (rounds := entries(cell))]
    known = [epsilon for epsilon in ends if epsilon]
    return float(f"{max(known):.2g}") if known else None
