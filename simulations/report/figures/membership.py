"""The figures of an audit: how well training rows are told from others, and the losses of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .drawing import Picture, axes, legend
from .style import KNOWN

_LEAST = 1e-3  # where the logarithmic axes begin
_LOOKS = [style for label, style in KNOWN.items() if label != "fedavg-zeropad"]
_BINS = 30


def curves(runs: Sequence[Mapping[str, Any]]) -> Picture:
    """For each run and score, the share of training rows that is found against that of other rows that is accused.

    Args:
        runs: the runs of an audit.json.
    """
    figure, ax = axes(height=4.4)
    rows: list[tuple[object, ...]] = []
    for run, look in zip(runs, _LOOKS, strict=False):
        for attack, dash in zip(run["attacks"], ("-", "--", ":"), strict=False):
            wrong, right = run["attacks"][attack]["curve"]
            ax.plot(wrong, right, color=look.color, linestyle=dash, label=f"{_named(run)}: {attack}")
            rows += [(run["run"], attack, x, y) for x, y in zip(wrong, right, strict=True)]
        if run["privacy"].get("level") == "example":
            at = np.geomspace(_LEAST, 1, 200)
            most = np.minimum(1, math.exp(run["privacy"]["epsilon"]) * at + run["privacy"]["delta"])
            ax.plot(at, most, color=look.color, linewidth=0.8, linestyle=(0, (1, 3)), label=f"{_named(run)}: at most")
    ax.plot([_LEAST, 1], [_LEAST, 1], color="#999999", linewidth=0.8, label="guessing")
    ax.set(xscale="log", yscale="log", xlim=(_LEAST, 1.05), ylim=(_LEAST, 1.05))
    ax.set(xlabel="share of other rows that are called members", ylabel="share of training rows that are found")
    legend(figure, ax)
    bound = " Dotted: what epsilon allows any attack on one row." * any(
        run["privacy"].get("level") == "example" for run in runs
    )
    return Picture(
        "membership",
        "Membership inference",
        f"An attacker calls rows with high scores members. The farther above guessing, the more leaks.{bound}",
        figure,
        ("run", "score", "other rows called members", "training rows found"),
        rows,
    )


def losses(run: Mapping[str, Any]) -> Picture:
    """Histograms of the losses of training rows and of others.

    Args:
        run: a run of an audit.json.
    """
    groups = {"training rows": run["losses"]["members"], "other rows": run["losses"]["others"]}
    edges = np.histogram_bin_edges(list(chain(*groups.values())), bins=_BINS)
    figure, ax = axes()
    rows: list[tuple[object, ...]] = []
    for (name, found), color in zip(groups.items(), ("#D55E00", "#0072B2"), strict=True):
        counts, _, _ = ax.hist(found, bins=list(edges), histtype="step", linewidth=1.4, color=color, label=name)
        bars = zip(edges, edges[1:], np.asarray(counts), strict=False)
        rows += [(name, low, high, int(count)) for low, high, count in bars]
    ax.set(xlabel="mean loss of a row (nats)", ylabel="rows")
    legend(figure, ax)
    return Picture(
        "membership-losses",
        "Losses of training rows and of others",
        "Where the two histograms differ, the loss of a row tells whether the adapter was trained on it.",
        figure,
        ("rows", "from", "to", "count"),
        rows,
    )


def _named(run: Mapping[str, Any]) -> str:
    epsilon = run["privacy"].get("epsilon")
    return f"{run['run']} (ε = {epsilon:.2g})" if epsilon is not None else run["run"]
