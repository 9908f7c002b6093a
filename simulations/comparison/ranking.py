"""Ranks strategies: chooses each one's learning rate on validation rows, and compares test metrics by paired tests."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import bootstrap, ttest_rel

from fedlora.tasks.by_value import plain

from .power import LEVEL, POWER, detectable, seeds_needed

_LOWER = frozenset({"loss", "perplexity", "calibration-error", "distance"})
# With fewer seeds, too few different resamples exist for an interval.
_LEAST_SEEDS = 5
# Differences that agree up to this share of the values differ only by rounding.
_ROUNDING = 1e-12

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Rate:
    """One learning rate of a sweep.

    Args:
        lr: the learning rate; None if nothing is trained.
        validation: mean validation metric over the seeds that completed; None if none did.
        seeds: the seeds that completed.
        failed: the seeds that did not complete, or whose metric is missing or not finite.
    """

    lr: float | None
    validation: float | None
    seeds: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A cell without a usable result, and the reason."""

    label: str
    lr: float | None
    seed: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """The learning rate that validation chose.

    Args:
        lr: the chosen rate; None if nothing is trained.
        edge: "lowest" or "highest" if the chosen rate is an end of the sweep, "no sweep" with one rate, else "".
        rates: the rates of the sweep, in ascending order.
        cells: the cells of the chosen rate that completed, by seed.
        failures: the failures at all rates.
    """

    lr: float | None
    edge: str
    rates: tuple[Rate, ...]
    cells: Mapping[int, Cell]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Row:
    """One strategy or baseline in one scenario, at its chosen learning rate.

    Args:
        label: name in the comparison.
        role: "strategy" or "baseline".
        choice: the chosen learning rate and its sweep.
        values: seed -> test metric.
        mean, sd, n: mean, standard deviation (with ddof 1; None for one seed) and number of these values.
        difference: mean over common seeds of the value minus the reference's value; None without common seeds.
        pairs: number of common seeds.
        spread: standard deviation of the differences over common seeds; None with fewer than two.
        interval: bootstrap interval of the difference at 95 %, see `bootstrap_interval`; None if it is undefined.
        p: p of the paired t-test on these differences; None if it is undefined.
        p_holm: p, corrected for the number of strategies in the scenario.
        rank: rank among the strategies, with 1 for the best; None for baselines, and with fewer than two seeds.
    """

    label: str
    role: str
    choice: Choice
    values: Mapping[int, float] = field(default_factory=dict)
    mean: float | None = None
    sd: float | None = None
    n: int = 0
    difference: float | None = None
    pairs: int = 0
    spread: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Ranking:
    """The ranking in one scenario.

    Args:
        scenario: name of the scenario.
        metric: the metric that is ranked.
        reference: label of the strategy with which the others are compared.
        rows: first the ranked strategies, then those without a rank, then baselines.
        notes: sentences that a reader needs about ranks and tests.
    """

    scenario: str
    metric: str
    reference: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failures in all rows."""
        return tuple(failure for row in self.rows for failure in row.choice.failures)


def lower_is_better(metric: str) -> bool:
    """Whether a metric is better when it is lower, as losses, perplexities, calibration errors and distances are."""
    return plain(metric) in _LOWER


def rank(cells: Sequence[Cell], metric: str, reference: str) -> list[Ranking]:
    """Rank the strategies of every scenario.

    Args:
        cells: results of a comparison's cells, of all scenarios, labels, learning rates and seeds; some may be missing.
        metric: the metric by which learning rates are chosen (in `scores.validation`) and strategies are ranked (in
            `scores.test`).
        reference: label of the strategy with which the others are compared.
    """
    scenarios: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        scenarios[cell["scenario"]].append(cell)
    return [_rank_one(name, found, metric, reference) for name, found in scenarios.items()]


def choose(cells: Sequence[Cell], metric: str) -> Choice:
    """The learning rate of one label in one scenario, by the mean validation metric over seeds.

    The rate is the first of `order`. The test metric is not used.
    """
    rates, failures = _sweep(cells, metric)
    known = [rate for rate in _ordered(rates, metric) if rate.validation is not None]
    if not known:
        return Choice(None, "", rates, {}, failures)
    best = known[0]
    edge = ""
    if best.lr is not None:
        ends = {0: "lowest", len(rates) - 1: "highest"}
        edge = "no sweep" if len(rates) == 1 else ends.get(rates.index(best), "")
    chosen = {cell["seed"]: cell for cell in cells if cell["lr"] == best.lr and cell["seed"] in best.seeds}
    return Choice(best.lr, edge, rates, dict(sorted(chosen.items())), failures)


def order(cells: Sequence[Cell], metric: str) -> list[Rate]:
    """The learning rates of one label in one scenario, the best first, by validation metrics.

    A rate that was run with more seeds goes first, since a race gives the better rates more of them; then one with
    fewer failed seeds, with the better mean, and the smaller one.
    """
    return _ordered(_sweep(cells, metric)[0], metric)


def _ordered(rates: Sequence[Rate], metric: str) -> list[Rate]:
    sign = 1.0 if lower_is_better(metric) else -1.0

    def place(rate: Rate) -> tuple[float, ...]:
        mean = math.inf if rate.validation is None else sign * rate.validation
        return -len(rate.seeds) - len(rate.failed), len(rate.failed), mean, rate.lr or 0.0

    return sorted(rates, key=place)


def _sweep(cells: Sequence[Cell], metric: str) -> tuple[tuple[Rate, ...], tuple[Failure, ...]]:
    """The learning rates in ascending order, and the failures at all of them."""
    usable: dict[float | None, dict[int, float]] = defaultdict(dict)
    failures: list[Failure] = []
    for cell in cells:
        reason = _flaw(cell, metric)
        by_seed = usable[cell["lr"]]
        if reason:
            failures.append(Failure(cell["label"], cell["lr"], cell["seed"], reason))
        else:
            by_seed[cell["seed"]] = cell["scores"]["validation"][metric]
    rates = tuple(
        Rate(
            lr,
            fmean(by_seed.values()) if by_seed else None,
            tuple(sorted(by_seed)),
            tuple(sorted(failure.seed for failure in failures if failure.lr == lr)),
        )
        for lr, by_seed in sorted(usable.items(), key=lambda item: (item[0] is not None, item[0] or 0.0))
    )
    return rates, tuple(failures)


def paired_p(differences: Sequence[float], scale: float) -> float | None:
    """Two-sided p of a paired t-test.

    Args:
        differences: one for each seed.
        scale: size of the values whose differences these are, by which rounding is judged.

    Returns:
        p; 1.0 if all differences are 0; None if there are fewer than two, or if all are equal but not 0, since their
        spread is then unknown.
    """
    found = np.asarray(differences, dtype=float)
    if len(found) < 2:
        return None
    least = _ROUNDING * scale
    if np.abs(found).max() <= least:
        return 1.0
    if np.ptp(found) <= least:
        return None
    return float(np.asarray(ttest_rel(found, np.zeros_like(found)).pvalue))


def bootstrap_interval(differences: Sequence[float], scale: float) -> tuple[float, float] | None:
    """An interval that holds the mean of paired differences with a confidence of 95 %, by the bootstrap over seeds.

    Efron 1987, "Better bootstrap confidence intervals" (BCa), with 9,999 resamples, which are the same in every call.
    With five or ten seeds such an interval is somewhat too narrow; the t-test decides.

    Args:
        differences, scale: as in `paired_p`.

    Returns:
        Lower and upper end; None with fewer than 5 differences, or if all are equal.
    """
    found = np.asarray(differences, dtype=float)
    if len(found) < _LEAST_SEEDS or np.ptp(found) <= _ROUNDING * scale:
        return None
    ends = bootstrap((found,), np.mean, confidence_level=1 - LEVEL, method="BCa", rng=0).confidence_interval
    return float(ends.low), float(ends.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979, "A simple sequentially rejective multiple test procedure").

    The i-th smallest of m values becomes `max_{j <= i} min(1, (m - j + 1) p_j)`. SciPy only has Benjamini and
    Hochberg's correction, which limits the rate of false discoveries, but not the probability of a single one.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for step, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[i]))
        corrected[i] = largest
    return corrected


def _flaw(cell: Cell, metric: str) -> str:
    """The reason why a cell has no usable result; "" if it has one."""
    if cell["status"] != "completed":
        return str(cell.get("error") or "no reason is recorded")
    for part in ("validation", "test"):
        value = cell.get("scores", {}).get(part, {}).get(metric)
        if value is None:
            return f"no {metric} on its {part} rows"
        if not math.isfinite(value):
            return f"{metric} on its {part} rows is {value}"
    return ""


def _rank_one(scenario: str, cells: Sequence[Cell], metric: str, reference: str) -> Ranking:
    labels: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        labels[cell["label"]].append(cell)
    rows = [_row(label, found, metric) for label, found in labels.items()]
    by_label = {row.label: row for row in rows}
    anchor = by_label.get(reference)
    if anchor and anchor.values:
        rows = [_compared(row, anchor) for row in rows]
    strategies = [row for row in rows if row.role == "strategy"]
    tests = [row for row in strategies if row.p is not None]
    corrected = dict(zip([row.label for row in tests], holm([row.p or 0.0 for row in tests]), strict=True))
    sign = 1.0 if lower_is_better(metric) else -1.0
    means = [sign * row.mean for row in strategies if row.n > 1 and row.mean is not None]
    done = [
        replace(
            row,
            p_holm=corrected.get(row.label),
            rank=1 + sum(mean < sign * row.mean for mean in means)
            if row.role == "strategy" and row.n > 1 and row.mean is not None
            else None,
        )
        for row in rows
    ]
    done.sort(key=lambda row: (row.role != "strategy", row.rank or len(rows) + 1, sign * (row.mean or 0.0)))
    return Ranking(scenario, metric, reference, tuple(done), tuple(_notes(strategies, anchor, reference)))


def _row(label: str, cells: Sequence[Cell], metric: str) -> Row:
    choice = choose(cells, metric)
    values = {seed: float(cell["scores"]["test"][metric]) for seed, cell in choice.cells.items()}
    numbers = list(values.values())
    return Row(
        label=label,
        role=cells[0]["role"],
        choice=choice,
        values=values,
        mean=fmean(numbers) if numbers else None,
        sd=stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
    )


def _compared(row: Row, reference: Row) -> Row:
    """The row with its difference from the reference, and, if it is another strategy, with a test."""
    seeds = sorted(row.values.keys() & reference.values.keys())
    if row.label == reference.label or not seeds:
        return row
    differences = [row.values[seed] - reference.values[seed] for seed in seeds]
    scale = max(abs(of.values[seed]) for of in (row, reference) for seed in seeds)
    p = paired_p(differences, scale) if row.role == "strategy" and reference.role == "strategy" else None
    spread = stdev(differences) if len(seeds) > 1 else None
    interval = bootstrap_interval(differences, scale)
    return replace(row, difference=fmean(differences), pairs=len(seeds), spread=spread, interval=interval, p=p)


def _notes(strategies: Sequence[Row], reference: Row | None, name: str) -> list[str]:
    most = max((row.n for row in strategies), default=0)
    if most == 0:
        return ["No strategy has a result yet."]
    if most == 1:
        return [
            "One seed: there are no ranks and no tests, because a difference between strategies could be the chance of "
            "this seed; run at least three seeds."
        ]
    notes = [
        f"{row.label} has {row.n} of the {most} seeds that others have"
        + ("; it gets no rank." if row.n < 2 else "; its mean and rank are of these alone.")
        for row in strategies
        if row.n < most
    ]
    if reference is None or not reference.values:
        notes.append(f"The reference {name} has no result here, so that there are no differences and no tests.")
    notes += _what_is_detectable(strategies, name)
    same = [row.label for row in strategies if row.pairs > 1 and row.p is None]
    if same:
        notes.append(f"{', '.join(same)}: all seeds differ from {name} by the same amount, so that p is undefined.")
    return notes


def _what_is_detectable(strategies: Sequence[Row], name: str) -> list[str]:
    """A sentence about the smallest difference that these seeds can show, by the usual spread of the differences."""
    spreads = [row.spread for row in strategies if row.p is not None and row.spread]
    if not spreads:
        return []
    spread, pairs = median(spreads), max(row.pairs for row in strategies)
    alone, first = detectable(spread, pairs), detectable(spread, pairs, LEVEL / len(spreads))
    half = seeds_needed(alone / 2, spread)
    return [
        f"Differences from {name} vary over seeds by {spread:.3g} (the median over strategies). With {pairs} seeds, "
        f"one test at {LEVEL:.0%} finds a true difference of {alone:.3g} with a probability of {POWER:.0%}; the first "
        f"of Holm's {len(spreads)} tests finds one of {first:.3g}. Half of the former would take {half} seeds."
    ]
