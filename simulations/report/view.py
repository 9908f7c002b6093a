"""One scenario with the data that its figures need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..comparison.ranking import Ranking, Row
from .figures.drawing import slug
from .figures.series import the_run
from .figures.style import Style


@dataclass(frozen=True)
class View:
    """A scenario with its ranking and the style of each label.

    Args:
        slug: part of the figures' names, unique in a report.
        strategies, baselines: the rows with at least one result; strategies are in the order of the grid.
    """

    scenario: str
    slug: str
    ranking: Ranking
    styles: Mapping[str, Style]
    strategies: tuple[Row, ...]
    baselines: tuple[Row, ...]
    seeds: int

    @property
    def metric(self) -> str:
        """The metric that is ranked."""
        return self.ranking.metric

    @property
    def spread_note(self) -> str:
        """Text about the meaning of bands and bars."""
        return "bands and bars ± one standard deviation" if self.seeds > 1 else "here of one seed, without a spread"


def view(ranking: Ranking, styles: Mapping[str, Style], order: Sequence[str], name: str) -> View:
    """The scenario of a ranking."""
    place = {label: i for i, label in enumerate(order)}
    rows = sorted((row for row in ranking.rows if row.values), key=lambda row: place.get(row.label, len(place)))
    return View(
        ranking.scenario,
        name,
        ranking,
        styles,
        tuple(row for row in rows if row.role == "strategy"),
        tuple(row for row in rows if row.role != "strategy"),
        max((row.n for row in rows), default=0),
    )


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A slug for each name; no two are the same."""
    found: dict[str, str] = {}
    for name in names:
        plain = candidate = slug(name)
        number = 2
        while candidate in found.values():
            candidate, number = f"{plain}-{number}", number + 1
        found[name] = candidate
    return found


def runs(row: Row) -> list[Mapping[str, Any]]:
    """The runs of the chosen learning rate, one for each seed."""
    return [run for cell in row.choice.cells.values() if (run := the_run(cell)) is not None]
