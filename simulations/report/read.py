"""Reads the folder of a comparison or of one run for a report, and changes nothing in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.common.errors import RunError

from .. import membership
from ..comparison.ranking import Cell

SCHEMA = 1
_CELL_KEYS = frozenset({"scenario", "label", "role", "lr", "seed", "status"})


@dataclass(frozen=True)
class Comparison:
    """A folder of `fedlora compare`.

    Args:
        grid: content of grid.json.
        cells: the cells that could be read, in the order of the grid's scenarios, strategies, baselines, rates, seeds.
        damaged: a sentence about each file that could not be read.
    """

    grid: Mapping[str, Any]
    cells: tuple[Cell, ...]
    damaged: tuple[str, ...]

    def of(self, scenario: str) -> list[Cell]:
        """The cells of one scenario."""
        return [cell for cell in self.cells if cell["scenario"] == scenario]


def comparison(folder: Path) -> Comparison:
    """Read the grid and all its cells.

    Raises:
        RunError: grid.json is missing, damaged, or of another schema.
    """
    grid = load(folder / "grid.json")
    lacking = {"metric", "reference", "strategies", "scenarios"} - grid.keys()
    if lacking:
        raise RunError(f"{folder / 'grid.json'}: lacks {', '.join(sorted(lacking))}; run fedlora compare again")
    cells: list[Cell] = []
    damaged: list[str] = []
    for path in sorted((folder / "cells").rglob("*.json")):
        try:
            cell = load(path)
            if missing := _CELL_KEYS - cell.keys():
                raise RunError(f"{path}: lacks {', '.join(sorted(missing))}; remove it and run fedlora compare again")
        except RunError as error:
            damaged.append(str(error).replace(f"{folder}/", ""))
        else:
            cells.append(cell)
    scenarios, labels = list(grid["scenarios"]), [*grid["strategies"], *grid.get("baselines", [])]

    def place(cell: Cell) -> tuple[Any, ...]:
        return (
            *_position(cell["scenario"], scenarios),
            *_position(cell["label"], labels),
            cell["lr"] or 0.0,
            cell["seed"],
        )

    return Comparison(grid, tuple(sorted(cells, key=place)), tuple(damaged))


def run(folder: Path) -> dict[str, Any]:
    """Read the result.json of one run.

    Raises:
        RunError: the file is missing, damaged, or of another schema.
    """
    found = load(folder / "result.json")
    if not isinstance(found.get("rounds"), list):
        raise RunError(f"{folder / 'result.json'}: has no rounds, it is not the record of a run; give another folder")
    return found


def audit(folder: Path) -> list[dict[str, Any]]:
    """The audited runs in the audit.json of a run's folder, its own first; empty if there is no such file.

    Raises:
        RunError: the file is damaged, or of another schema.
    """
    path = folder / membership.NAME
    if not path.is_file():
        return []
    found = load(path).get("runs")
    if not isinstance(found, list):
        raise RunError(f"{path}: has no runs, it is not the record of an audit; remove it and run fedlora audit again")
    return found


def load(path: Path) -> dict[str, Any]:
    """One JSON object of this version's schema.

    Raises:
        RunError: the file cannot be read, is not a JSON object, or has another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}; remove it and run again") from None
    if not isinstance(data, dict):
        raise RunError(f"{path}: holds a {type(data).__name__}, expected an object; remove it and run again")
    if data.get("schema") != SCHEMA:
        raise RunError(
            f"{path}: schema {data.get('schema')!r}, this version reads {SCHEMA}; use the version that wrote it"
        )
    return data


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, for tables of settings."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _position(name: str, names: list[str]) -> tuple[int, str]:
    return (names.index(name), "") if name in names else (len(names), name)
