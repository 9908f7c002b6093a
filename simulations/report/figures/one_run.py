"""The figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from . import shapes
from .costs import bars, round_numbers
from .curves import FLOOR, draw_line, floor_axis
from .drawing import Picture, axes, legend, panels
from .series import Entry, intruders, is_timed, points
from .spectra import adapter_spectra
from .style import KNOWN, Style

_MOST_CLIENTS = 20
_MOST_BARS = 40


@dataclass(frozen=True)
class Kind:
    """A figure of numbers by round.

    Args:
        name: name of the figure's files.
        title: title above the figure.
        unit: unit of the y axis.
        reading: sentences on how to read the figure.
        values: label of a line -> function from a round's record to the line's number.
    """

    name: str
    title: str
    unit: str
    reading: str
    values: Mapping[str, Callable[[Entry], float | None]]


KINDS = {
    "aggregation error": Kind(
        "aggregation-error",
        "Errors by round",
        "relative error",
        "Distance of the aggregate from the exact weighted mean of updates; values below 10⁻⁷ are rounding, and stand "
        "on the floor. Sketch: what the sketched sum lost of that mean, estimated.",
        {
            "aggregation": lambda e: e.get("aggregation-error"),
            "codec": lambda e: e.get("codec-error"),
            "sketch": lambda e: e.get("sketch-loss"),
        },
    ),
    "effective rank": Kind(
        "effective-rank",
        "Effective rank by round",
        "effective rank (mean over modules)",
        "The number of directions that the mean update uses.",
        {"effective rank": lambda e: e.get("effective-rank")},
    ),
    "drift": Kind(
        "drift",
        "Drift and cosine between clients by round",
        "drift, cosine",
        "Drift is 0 if all clients' updates are equal; the cosine is 1 if they have one direction.",
        {"drift": lambda e: e.get("drift"), "update cosine": lambda e: e.get("update-cosine")},
    ),
    "intruder dimensions": Kind(
        "intruders",
        "Intruder dimensions by round",
        "intruder dimensions (mean over modules)",
        "Number of leading directions of the tuned weights that are like no direction of the base model.",
        {"intruders": intruders},
    ),
}


def heldout(entry: Entry) -> Mapping[str, float]:
    """A round's metrics on held-out rows."""
    return entry.get("heldout", {})


def own(entry: Entry) -> Mapping[str, float]:
    """A round's metrics on the clients' own test rows, as means over clients."""
    return entry.get("client-test", {}).get("mean", {})


def metrics(run: Mapping[str, Any], style: Style) -> list[Picture]:
    """Loss and accuracy by round, by megabytes, by seconds, and by virtual time where the run had a virtual clock."""
    lines = {
        (metric, where): points([run], lambda entry, m=metric, pick=pick: pick(entry).get(m))
        for metric in ("loss", "accuracy")
        for where, pick in (("held-out rows", heldout), ("clients' own rows", own))
    }
    lines = {key: found for key, found in lines.items() if found}
    metrics = list(dict.fromkeys(metric for metric, _ in lines))
    pictures: list[Picture] = []
    units = {"round": "round", "megabytes": "megabytes sent, up and down (10⁶ bytes)", "seconds": "seconds"}
    if is_timed([run]):
        units["hours"] = "hours of virtual time"
    for along, unit in units.items() if metrics else ():
        figure, grid = panels(len(metrics), 9.0)
        for ax, metric in zip(grid, metrics, strict=True):
            for (kind, where), found in lines.items():
                if kind == metric:
                    draw_line(ax, where, found, style if where.startswith("held") else KNOWN["local"], along=along)
            ax.set(xlabel=unit, ylabel=f"{metric} (nats)" if metric == "loss" else metric)
            if along == "round":
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, grid[0])
        pictures.append(
            Picture(
                f"metric-{along}",
                f"Loss and accuracy by {along}" if len(metrics) > 1 else f"{metrics[0].capitalize()} by {along}",
                "Metrics of the model after each round; round 0 is the model before any training.",
                figure,
                ("metric", "rows", "round", "megabytes", time := "hours" if along == "hours" else "seconds", "value"),
                [(*key, p.round, p.megabytes, getattr(p, time), p.mean) for key, found in lines.items() for p in found],
            )
        )
    return pictures


def lines(run: Mapping[str, Any], style: Style, kind: Kind) -> list[Picture]:
    """A figure with numbers of each round as lines; None if no round has any."""
    drawn = {label: found for label, value in kind.values.items() if (found := points([run], value))}
    if not drawn:
        return []
    figure, ax = axes()
    log = kind.name == "aggregation-error"
    for i, (label, found) in enumerate(drawn.items()):
        draw_line(ax, label, found, style if i == 0 else KNOWN["local"], floor=FLOOR if log else None)
    ax.set(xlabel="round", ylabel=kind.unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        floor_axis(ax)
    legend(figure, ax)
    rows = [(label, p.round, p.mean) for label, found in drawn.items() for p in found]
    return [Picture(kind.name, kind.title, kind.reading, figure, ("number", "round", "value"), rows)]


def clients(run: Mapping[str, Any]) -> list[Picture]:
    """Each client's mean training loss by round; if there are very many clients, only of the first ones."""
    names = sorted({name for entry in run["rounds"] for name in entry.get("clients", {})}, key=lambda n: (len(n), n))
    shown = names[:_MOST_CLIENTS]
    ranks = {str(client["client-id"]): client["rank"] for client in run.get("clients", [])}
    lines = {
        name: points([run], lambda entry, n=name: entry.get("clients", {}).get(n, {}).get("train-loss"))
        for name in shown
    }
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        return []
    looks = dict(zip(lines, [style for label, style in KNOWN.items() if style.marker not in "x+|"] * 2, strict=False))
    figure, ax = axes(height=max(3.6, 0.185 * len(lines) + 0.5))
    for name, found in lines.items():
        rank = f" (r = {ranks[name]})" if name in ranks else ""
        draw_line(ax, f"client {name}{rank}", found, looks[name])
    ax.set(xlabel="round", ylabel="mean training loss (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, ax)
    more = f" The first {len(shown)} of {len(names)} clients." if len(names) > len(shown) else ""
    rows = [(name, p.round, p.mean) for name, found in lines.items() for p in found]
    reading = f"Training loss on a client's own rows, as the mean over its steps in a round.{more}"
    return [
        Picture("clients", "Training loss of each client", reading, figure, ("client", "round", "train-loss"), rows)
    ]


def cost(rounds: Sequence[Entry]) -> list[Picture]:
    """Bytes and seconds of each round; if there are very many rounds, only of the last ones."""
    if not rounds:
        return []
    last = rounds[-_MOST_BARS:]
    found = {f"round {entry['round']}": round_numbers(entry) for entry in last}
    words = f"The last {len(last)} of {len(rounds)} rounds." if len(last) < len(rounds) else ""
    return [bars("cost", found, words)]


def spectrum(folder: Path, name: str, style: Style) -> list[Picture]:
    """The spectra of the adapter that the run has saved, if it can be read."""
    try:
        values = adapter_spectra(folder / "adapter")
    except (OSError, ValueError, KeyError):
        return []
    lines = {name: [sum(at) / len(values) for at in zip(*values, strict=True)]} if values else {}
    found = shapes.spectrum("spectra", lines, {name: style})
    return [found] if found else []
