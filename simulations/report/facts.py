"""The sentences of the page: what was compared, what to beware of, and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..comparison.ranking import Cell, Ranking, lower_is_better
from .read import Comparison, distinct, flat
from .tables import Table

# Keys that are part of the sweep, or name a place.
_SWEPT = frozenset({"train.lr", "run.seed", "run.dir", "run.name", "run.id", "run.resume"})


def summary(comparison: Comparison) -> list[str]:
    """Sentences about what was compared, and how."""
    grid, cells = comparison.grid, comparison.cells
    metric = grid["metric"]
    rates, seeds = grid.get("learning-rates", []), grid.get("seeds", [])
    done = sum(cell["status"] == "completed" for cell in cells)
    baselines = grid.get("baselines", [])
    sentences = [
        f"{_count(len(grid['strategies']), 'strategy', 'strategies')} in "
        f"{_count(len(grid['scenarios']), 'scenario')}, at {_count(len(rates), 'learning rate')} "
        f"({', '.join(f'{lr:g}' for lr in rates)}) and with {_count(len(seeds), 'seed')} "
        f"({', '.join(map(str, seeds))})" + (f"; baselines: {', '.join(baselines)}." if baselines else "."),
        f"{done} of {grid.get('cells', len(cells))} cells are complete.",
        f"The metric is {metric}, better when {'lower' if lower_is_better(metric) else 'higher'}. The learning rate of "
        f"each strategy is the one with the best mean {metric} over seeds on validation rows. The tables rank by the "
        f"{metric} of the final model on test rows. No client trained on validation or test rows.",
        f"Differences are from {grid['reference']}, paired by seed, with a paired t-test and Holm's correction over "
        "all strategies of a scenario; their intervals at 95 % are by the bootstrap over seeds. Baselines are only for "
        "orientation, and have neither rank nor test.",
    ]
    if grid.get("race", "none") != "none":
        arms = " Strategies that were worse beyond doubt dropped out from the third seed on." * (grid["race"] == "arms")
        sentences.append(
            "The grid was a race by validation metrics: after each seed the better half of a strategy's learning rates "
            f"went on, until one was left, which has all seeds.{arms}"
        )
    rows = _rows(cells)
    if rows:
        sentences.append(rows)
    for name, changes in grid["scenarios"].items():
        told = ", ".join(f"{key} = {value}" for key, value in changes.items())
        sentences.append(f"Scenario {name}: {told or 'the settings below as they are'}.")
    return sentences


def warnings(comparison: Comparison, rankings: Sequence[Ranking]) -> list[str]:
    """Sentences about what a reader must know before trusting a table."""
    grid, cells = comparison.grid, comparison.cells
    found = list(comparison.damaged)
    planned = grid.get("cells", len(cells))
    missing = planned - len(cells) - len(comparison.damaged)
    if missing > 0:
        found.append(f"{missing} of {planned} cells are missing: the comparison is not finished.")
    if len(grid.get("learning-rates", [])) == 1:
        found.append("One learning rate: no strategy's rate was tuned, and another rate may change the order.")
    for ranking in rankings:
        found += [f"{ranking.scenario}: {note}" for note in ranking.notes]
        edges = [f"{r.label} ({r.choice.edge})" for r in ranking.rows if r.choice.edge in {"lowest", "highest"}]
        if edges:
            found.append(
                f"{ranking.scenario}: the best learning rate lies at an end of the sweep, and a better one may lie "
                f"beyond it: {', '.join(edges)}."
            )
        found += [
            f"{ranking.scenario}: {f.label}{'' if f.lr is None else f' at {f.lr:g}'}, seed {f.seed}, failed: {f.reason}"
            for f in ranking.failures
        ]
    codes = distinct(cell.get("code", {}) for cell in cells if cell.get("code"))
    if any(code.get("dirty") for code in codes):
        found.append("The code had changes that are in no commit.")
    if len({code.get("commit") for code in codes}) > 1:
        found.append("The cells are of several commits: " + ", ".join(str(code["commit"])[:10] for code in codes) + ".")
    for name, bases in _bases(cells).items():
        if len(bases) > 1:
            found.append(
                f"The cells on {name} began from {len(bases)} models with other weights (fingerprints "
                f"{', '.join(bases)}), as when a packaged model was trained again meanwhile."
            )
    devices = distinct(_device(cell) for cell in cells if cell.get("device"))
    if len(devices) > 1:
        found.append(f"The cells ran on several devices, so that their seconds do not compare: {'; '.join(devices)}.")
    return found


def settings(comparison: Comparison) -> list[Table]:
    """The config keys that are equal in all cells, and those that differ, with what they depend on."""
    configs = [(cell, flat(cell["config"])) for cell in comparison.cells if cell.get("config")]
    keys = sorted({key for _, config in configs for key in config} - _SWEPT)
    shared, differing = [], []
    for key in keys:
        values = distinct(config.get(key) for _, config in configs)
        if len(values) == 1:
            shared.append((key, _text(values[0])))
        else:
            differing.append((key, _by(configs, key)))
    tables = [Table("What all cells share", ("key", "value"), tuple(shared), left=frozenset({0, 1}))]
    if differing:
        tables.append(Table("What differs", ("key", "values"), tuple(differing), left=frozenset({0, 1})))
    return [table for table in tables if table.rows]


def origin(records: Sequence[Mapping[str, Any]]) -> Table:
    """Commits, versions and devices of cells or runs."""
    rows = [
        *[
            ("commit", _text(code.get("commit")) + (" with changes" if code.get("dirty") else ""))
            for code in distinct(one.get("code") for one in records if one.get("code"))
        ],
        *[("device", text) for text in distinct(_device(one) for one in records if one.get("device"))],
        *[
            ("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))
            for versions in distinct(one.get("versions") for one in records if one.get("versions"))
        ],
    ]
    return Table("Versions, commit, device", ("", ""), tuple(rows), left=frozenset({0, 1}))


def _bases(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Model and quantization -> fingerprints of the base models on which its cells ran."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        keys = flat(cell.get("config", {}))
        known = found.setdefault(f"{keys.get('model.name')} ({keys.get('model.quantization')})", [])
        known += {run["base"] for run in cell.get("runs", ()) if "base" in run} - {*known}
    return found


def _by(configs: Sequence[tuple[Cell, Mapping[str, Any]]], key: str) -> str:
    """The values of a key by strategy, by scenario, or by both, whichever first explains all differences."""
    kinds: list[Callable[[Cell], str]] = [
        lambda cell: cell["label"],
        lambda cell: cell["scenario"],
        lambda cell: f"{cell['scenario']} / {cell['label']}",
    ]
    for kind in kinds:
        found: dict[str, list[Any]] = {}
        for cell, config in configs:
            known = found.setdefault(kind(cell), [])
            if config.get(key) not in known:
                known.append(config.get(key))
        if all(len(values) == 1 for values in found.values()):
            names: dict[str, list[str]] = {}
            for name, values in found.items():
                names.setdefault(_text(values[0]), []).append(name)
            return "; ".join(f"{value}: {', '.join(of)}" for value, of in names.items())
    return "varies from cell to cell: " + ", ".join(_text(v) for v in distinct(c.get(key) for _, c in configs)[:8])


def _rows(cells: Sequence[Cell]) -> str:
    """Text about the numbers of rows on which the metrics were computed."""
    told: list[str] = []
    for part in ("validation", "test"):
        counts = sorted(
            {n for cell in cells if (n := cell.get("scores", {}).get(part, {}).get("examples")) is not None}
        )
        if counts:
            told.append(f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "") + f" {part} rows")
    return f"Metrics are of {' and '.join(told)}." if told else ""


def _device(cell: Mapping[str, Any]) -> str:
    facts = cell.get("device", {})
    gpus = ", ".join(facts.get("gpus", []))
    return " ".join(
        str(part) for part in (facts.get("device"), f"({gpus})" if gpus else "", facts.get("platform", "")) if part
    )


def _count(number: int, word: str, several: str = "") -> str:
    return f"{number} {word if number == 1 else several or word + 's'}"


def _text(value: Any) -> str:
    return "—" if value is None or value == "" else str(value)
