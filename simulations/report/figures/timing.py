"""How a run on a virtual clock used its time: the share in which clients were idle, and the updates' staleness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..view import View, runs
from .curves import draw_line
from .drawing import Picture, panels
from .series import Point, is_timed
from .style import Style

_MOST_SHOWN = 30  # largest staleness that is drawn


def idle_share(run: Mapping[str, Any]) -> float | None:
    """The share of the clients' time, over all that may train at once, in which no counted update was made.

    It is `1 - sum of (answered - asked) / sum of (clients at once * length)`. The former sum is over the updates that
    counted and the trainings that go on at the end, the latter over the rounds. Clients at once are those of the
    schedule, or those that trained as the round began. A device that sleeps while it is asked counts as at work.

    Args:
        run: content of result.json.

    Returns:
        The share; None for a run without a virtual clock.
    """
    rounds = [entry for entry in run.get("rounds", []) if "time" in entry]
    if not rounds or not rounds[-1]["time"]:
        return None
    times = [0.0, *(entry["time"] for entry in rounds)]
    time = 0.0
    for entry, (began, ended) in zip(rounds, pairwise(times), strict=True):
        asked = len(entry["clients"]) + len(entry.get("failures") or ())
        time += entry.get("at-once", asked) * (ended - began)
    answers = [client for entry in rounds for client in entry["clients"].values() if "answered" in client]
    worked = sum(client["answered"] - client["asked"] for client in answers)
    return 1 - (worked + rounds[-1].get("training-seconds", 0.0)) / time


def staleness(runs: Sequence[Mapping[str, Any]]) -> Counter[int]:
    """Staleness -> number of updates that counted with it; those of a synchronous round have none."""
    found: Counter[int] = Counter()
    for entry in (entry for run in runs for entry in run.get("rounds", []) if "time" in entry):
        stale = entry.get("staleness", {})
        found.update(stale.get(client, 0) for client in entry["clients"])
    return found


def compared(view: View) -> list[Picture]:
    """Idle share and staleness of each strategy."""
    return _picture(f"timing-{view.slug}", {row.label: runs(row) for row in view.strategies}, view.styles)


def of_run(run: Mapping[str, Any], name: str, style: Style) -> list[Picture]:
    """Idle share and staleness of one run."""
    return _picture("timing", {name: [run]}, {name: style})


def _picture(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Style]) -> list[Picture]:
    found = {label: timed for label, each in found.items() if (timed := [run for run in each if is_timed([run])])}
    idle = {label: fmean(idle_share(run) or 0.0 for run in each) for label, each in found.items()}
    if not idle:
        return []
    figure, (left, right) = panels(2, 9.5, 0.3 * len(idle) + 2.6)
    places = range(len(idle))
    left.barh(places, list(idle.values()), 0.7, color=[styles[label].color for label in idle])
    for place, share in zip(places, idle.values(), strict=True):
        left.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=8)
    left.set_yticks(places, list(idle))
    left.set_ylim(len(idle) - 0.4, -0.6)
    left.set_xlim(0, 1.1)
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_xlabel("idle share of the clients' time")
    left.grid(visible=False, axis="y")
    rows: list[tuple[object, ...]] = [(label, "idle share", "", share) for label, share in idle.items()]
    for label, each in found.items():
        counts = staleness(each)
        total = sum(counts.values())
        shares = [counts[late] / total for late in range(min(max(counts), _MOST_SHOWN) + 1)]
        line = [Point(late, 0.0, 0.0, 0.0, share, 0.0, len(each)) for late, share in enumerate(shares)]
        draw_line(right, label, line, styles[label])
        rows += [(label, "updates", late, count) for late, count in sorted(counts.items())]
    right.set(xlabel="staleness (rounds that ended while a client trained)", ylabel="share of the updates")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=7, frameon=False)
    reading = (
        "Left: the part of the time of all clients that may train at once in which none made an update that counted; "
        "a device that sleeps while it is asked counts as at work. Right: of the updates that counted, the share that "
        f"was so many rounds late{', up to ' + str(_MOST_SHOWN) if _most(found) > _MOST_SHOWN else ''}."
    )
    columns = ("strategy", "number", "staleness", "value")
    return [Picture(name, "Idle time and staleness", reading, figure, columns, rows)]


def _most(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    return max(max(staleness(each), default=0) for each in found.values())
