"""Numbers over rounds and over seeds, taken from cells and runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedlora.tasks.by_value import named

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A number at one round, over seeds.

    Args:
        round: number of the round; 0 is before training.
        megabytes: megabytes (10^6 bytes) that were sent up and down until then, mean over seeds.
        seconds: seconds until then, mean over seeds.
        hours: hours of the run's virtual time until then, mean over seeds; 0 in a run without.
        mean, sd, n: mean, standard deviation (with ddof 1; 0 for one seed) and number of values over seeds.
    """

    round: int
    megabytes: float
    seconds: float
    hours: float
    mean: float
    sd: float
    n: int


def spread(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (0 with one value) and count."""
    found = list(values)
    return fmean(found), stdev(found) if len(found) > 1 else 0.0, len(found)


def the_run(cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The only run of a cell; None if there is none, or one for each client."""
    runs = cell.get("runs", [])
    return runs[0] if len(runs) == 1 else None


def entries(cell: Mapping[str, Any]) -> list[Entry]:
    """Rounds of the cell's only run."""
    run = the_run(cell)
    return list(run.get("rounds", [])) if run else []


def is_personal(cell: Mapping[str, Any]) -> bool:
    """Whether clients evaluated their own models, and the server never did."""
    rounds = entries(cell)
    return any("client-test" in entry for entry in rounds) and not any("heldout" in entry for entry in rounds)


def score(entry: Entry, metric: str) -> float | None:
    """The metric on held-out rows; for a strategy with personal factors, the clients' mean on their own rows."""
    if "heldout" in entry:
        return {**entry["heldout"], **named(entry.get("heldout-by", {}))}.get(metric)
    return entry.get("client-test", {}).get("mean", {}).get(metric)


def start(run: Mapping[str, Any]) -> list[Entry]:
    """The metrics before training, as the record of a round 0; empty if the server did not evaluate."""
    if "baseline" not in run:
        return []
    by = {"heldout-by": run["baseline-by"]} if "baseline-by" in run else {}
    return [{"round": 0, "heldout": run["baseline"], **by}]


def points(runs: Sequence[Mapping[str, Any]], value: Callable[[Entry], float | None]) -> list[Point]:
    """A number by round over the runs of all seeds.

    Args:
        runs: result.json of each seed.
        value: function from a round's record to the number, or None. The record of round 0 is `start` of the run.
    """
    found: dict[int, list[tuple[float, float, float, float]]] = defaultdict(list)
    for run in runs:
        sent = spent = 0.0
        rounds = run.get("rounds", [])
        for entry in [*start(run), *rounds]:
            sent += (entry.get("upload-bytes", 0) + entry.get("download-bytes", 0)) / 1e6
            spent += entry.get("seconds", {}).get("round", 0.0)
            number = value(entry)
            if number is not None and math.isfinite(number):
                found[entry["round"]].append((sent, spent, entry.get("time", 0.0) / 3600, number))
    columns = {number: list(zip(*rows, strict=True)) for number, rows in sorted(found.items())}
    return [
        Point(number, fmean(sent), fmean(spent), fmean(hours), *spread(values))
        for number, (sent, spent, hours, values) in columns.items()
    ]


def is_timed(runs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a run had a virtual clock."""
    return any("time" in entry for run in runs for entry in run.get("rounds", []))


def phases(rounds: Sequence[Entry]) -> dict[str, float]:
    """Mean seconds of a round by phase; the rest of the time is "other"."""
    total: dict[str, float] = defaultdict(float)
    for entry in rounds:
        seconds = entry.get("seconds", {})
        named = {name: value for name, value in seconds.items() if name != "round"}
        for name, value in named.items():
            total[name] += value
        within = sum(value for name, value in named.items() if name != "checkpoint")
        total["other"] += max(0.0, seconds.get("round", within) - within)
    return {name: value / len(rounds) for name, value in total.items()} if rounds else {}


def mean_bytes(rounds: Sequence[Entry], key: str) -> float | None:
    """Mean bytes of a round, over the rounds that have this number; None if none has."""
    known = [entry[key] for entry in rounds if entry.get(key) is not None]
    return fmean(known) if known else None


def client_scores(cell: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Each client's test metric, by client id."""
    clients = cell.get("scores", {}).get("test", {}).get("clients", {})
    known = {name: one.get(metric) for name, one in clients.items()}
    return {name: float(value) for name, value in known.items() if value is not None and math.isfinite(value)}


def client_metric(cells: Iterable[Mapping[str, Any]], metric: str) -> str | None:
    """The metric to show for single clients: the given one if they have it, else accuracy, else loss."""
    found = list(cells)
    return next((name for name in (metric, "accuracy", "loss") if any(client_scores(c, name) for c in found)), None)


def mean_spectrum(spectra: Iterable[Mapping[str, Sequence[float]]]) -> list[float]:
    """Singular values by index, mean over all modules of all adapters; a module without an i-th counts as 0."""
    rows = [list(values) for one in spectra for values in one.values()]
    longest = max((len(row) for row in rows), default=0)
    return [fmean(row[i] if i < len(row) else 0.0 for row in rows) for i in range(longest)]


def intruders(entry: Entry) -> float | None:
    """Intruder dimensions of a round, mean over modules."""
    counts = entry.get("intruders")
    return fmean(counts.values()) if counts else None
