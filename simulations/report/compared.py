"""The report of a comparison: a section for each scenario, and its final tables as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..comparison.ranking import rank
from . import facts, tables
from .by_value import table as by_value
from .figures import costs, curves, epsilons, outcomes, shapes, timing
from .figures.drawing import Picture
from .figures.series import is_personal
from .figures.style import styles
from .page import Page, Section
from .read import Comparison
from .view import View, slugs, view

Say = Callable[[str], None]


def page(comparison: Comparison, name: str, say: Say) -> Page:
    """The contents of a comparison's page.

    Args:
        comparison: the comparison.
        name: name of the comparison's folder, used if the grid has no name.
        say: called with a line of text before each scenario's figures are drawn.
    """
    grid = comparison.grid
    rankings = rank(comparison.cells, grid["metric"], grid["reference"])
    order = [*grid["strategies"], *grid.get("baselines", [])]
    looks = styles([*order, *(cell["label"] for cell in comparison.cells)])
    names = slugs([ranking.scenario for ranking in rankings])
    sections: list[Section] = []
    views: list[View] = []
    for ranking in rankings:
        say(f"scenario {ranking.scenario}: drawing")
        seen = view(ranking, looks, order, names[ranking.scenario])
        views.append(seen)
        records = tables.records(ranking)
        pictures, absent = _pictures(seen, comparison)
        table = tables.final(ranking, records, f"Final {grid['metric']} in scenario {ranking.scenario}")
        sections.append(Section(f"Scenario {ranking.scenario}", [table, *by_value(ranking)], pictures, absent))
    if private := epsilons.by_epsilon(views, {seen.scenario: comparison.of(seen.scenario) for seen in views}):
        sections.insert(0, Section("Privacy", pictures=private))
    lacking = [one for one in grid["scenarios"] if one not in names]
    summary = facts.summary(comparison) + [f"Scenario {one} has no cells yet." for one in lacking]
    title = str(grid.get("name") or name)
    settings = [*facts.settings(comparison), facts.origin(comparison.cells)]
    return Page(
        f"Federated strategies compared: {title}", summary, facts.warnings(comparison, rankings), sections, settings
    )


def write_tables(comparison: Comparison, page: Page, out: Path) -> None:
    """Write tables/final.md, .tex and .csv."""
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    shown = [table for section in page.sections for table in section.tables]
    rankings = rank(comparison.cells, comparison.grid["metric"], comparison.grid["reference"])
    rows = [record for ranking in rankings for record in tables.records(ranking)]
    (folder / "final.md").write_text(tables.markdown(shown), encoding="utf-8")
    (folder / "final.tex").write_text(tables.latex(shown), encoding="utf-8")
    (folder / "final.csv").write_text(tables.to_csv(rows), encoding="utf-8")


def _pictures(seen: View, comparison: Comparison) -> tuple[list[Picture], Sequence[str]]:
    """The scenario's figures, and a sentence about figures that lack numbers."""
    diagnosed = curves.diagnostics(seen)
    kinds: dict[str, list[Picture]] = {
        "the final metric": outcomes.final(seen),
        "the metric over rounds": curves.metric_curves(seen),
        "the learning-rate sweep": outcomes.sweep(seen),
        "the clients' own metrics": outcomes.fairness(seen),
        **{
            words: [picture for picture in diagnosed if picture.name == f"{name}-{seen.slug}"]
            for name, words in (
                ("aggregation-error", "aggregation error"),
                ("effective-rank", "effective rank"),
                ("drift", "drift"),
                ("update-cosine", "cosine between updates"),
                ("intruders", "intruder dimensions"),
            )
        },
        "spectra": shapes.spectra(seen),
        "cost": costs.cost(seen),
        "the partition": shapes.partition(seen, comparison.of(seen.scenario)),
    }
    missing = [words for words, found in kinds.items() if not found]
    absent = [f"Not shown, since this scenario has no numbers for them: {', '.join(missing)}."] if missing else []
    personal = [row.label for row in seen.strategies if any(map(is_personal, row.choice.cells.values()))]
    if personal:
        absent.append(
            f"{', '.join(personal)}: personal; what is scored is each client's own model, and its curves are the "
            "clients' mean on their own rows, the only ones that can be drawn."
        )
    drawn = [picture for found in kinds.values() for picture in found]
    return [*drawn, *timing.compared(seen)], absent
