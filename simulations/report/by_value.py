"""Metrics by value of a column, such as the domains: the section of a run, and the table of a comparison's scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from fedlora.tasks.by_value import plain

from ..comparison.ranking import Ranking
from .figures import values
from .page import Section
from .tables import Table


def section(run: Mapping[str, Any]) -> Section | None:
    """The section of a run: the metrics of each value after the last evaluation, and by round; None without any."""
    evaluated = [entry for entry in run["rounds"] if "heldout-by" in entry]
    if not evaluated:
        return None
    last = evaluated[-1]
    by = last["heldout-by"]
    names = list(by["mean"])
    rows = [
        (value, str(metrics["rows"]), *(f"{metrics[name]:.4f}" for name in names))
        for value, metrics in by["values"].items()
    ]
    below = [("mean", "", *(f"{by['mean'][name]:.4f}" for name in names))]
    if len(rows) > 1:
        spreads = [stdev(metrics[name] for metrics in by["values"].values()) for name in names]
        below.append(("standard deviation", "", *(f"{spread:.4f}" for spread in spreads)))
    below.append(("worst", "", *(f"{by['worst'][name]:.4f}" for name in names)))
    title = f"Held-out rows by {by['column']}, after round {last['round']}"
    table = Table(
        title,
        (by["column"], "rows", *names),
        (*rows, *below),
        (*(False for _ in rows), *(True for _ in below)),
        frozenset({0}),
    )
    said = f"Mean, standard deviation and worst are over the values of {by['column']}, each of which counts the same."
    return Section(f"By {by['column']}", [table], values.by_round(run), [said])


def table(ranking: Ranking) -> list[Table]:
    """A table of a scenario's test metrics by strategy and value, as means over seeds; empty without any."""
    found = {row.label: [cell["scores"]["test"] for cell in row.choice.cells.values()] for row in ranking.rows}
    by = next((scores["by"] for each in found.values() for scores in each if "by" in scores), None)
    if by is None:
        return []
    metric = _metric(ranking.metric, by["values"])
    names = list(dict.fromkeys(value for each in found.values() for scores in each for value in _values(scores)))
    means = {f"{metric}-mean-by": "mean", f"{metric}-worst-by": "worst"}
    rows = [
        (
            label,
            *(_mean([_values(scores).get(name, {}).get(metric) for scores in each]) for name in names),
            *(_mean([scores.get(name) for scores in each]) for name in means),
        )
        for label, each in found.items()
    ]
    return [
        Table(
            f"Test {metric} by {by['column']} in scenario {ranking.scenario}, mean over seeds",
            ("strategy", *names, *means.values()),
            tuple(rows),
            tuple(row.role != "strategy" for row in ranking.rows),
            frozenset({0}),
        )
    ]


def _values(scores: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    return scores.get("by", {}).get("values", {})


def _metric(metric: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """The metric that the table shows: the ranked one without an ending such as -mean-by."""
    known = next(iter(values.values()))
    return next(name for name in (plain(metric), "accuracy", "loss") if name in known)


def _mean(found: Sequence[float | None]) -> str:
    known = [value for value in found if value is not None]
    return f"{fmean(known):.4f}" if known else ""
