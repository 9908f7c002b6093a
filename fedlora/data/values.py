"""The rows of each value of a column, such as the domains of a set, for metrics by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

from .places import places

if TYPE_CHECKING:
    from datasets import Dataset

    from .partition import Split

MOST = 50  # largest number of values; more would be a table that nobody reads


def rows_by_value(rows: Dataset, column: str, data: DataConfig) -> dict[str, np.ndarray]:
    """The numbers of the rows that have each value of a column, int64, by the value's text.

    Texts are in alphabetical order, numbers in ascending order, and classes, which have their names, in the order of
    their numbers.

    Args:
        rows: the rows, such as the held-out ones.
        column: name of the column, `evaluate.by`.
        data: the section data, which names the source.

    Raises:
        DataError: there is no such column, a cell of it is empty or holds no text or number, or it has more than 50
            values.
    """
    cells = texts_of(rows, column, data)
    found = {value: np.flatnonzero(cells == value) for value in dict.fromkeys(cells.tolist())}
    if len(found) > MOST:
        raise DataError(
            f"{data.source}: evaluate.by = {column!r} has {len(found)} values in {len(rows)} held-out rows, and the "
            f"largest number that metrics are given for is {MOST}; name a column with fewer values, such as a domain"
        )
    return {value: found[value] for value in _in_order(rows, column, found)}


def values_without_rows(split: Split, column: str, data: DataConfig) -> list[str]:
    """The values of a column that the clients' rows have and no held-out row has; arguments as in `rows_by_value`."""
    clients = split.rows.select(np.concatenate(split.parts))
    return sorted({*texts_of(clients, column, data)} - {*texts_of(split.heldout, column, data)})


def texts_of(rows: Dataset, column: str, data: DataConfig) -> np.ndarray:
    """A column as texts, with the name of a class in place of its number; arguments as in `rows_by_value`.

    Raises:
        DataError: there is no such column, or a cell of it is empty or holds no text or number.
    """
    if column not in rows.column_names:
        raise DataError(
            f"{data.source}: no column {column!r}, which evaluate.by names; the columns are "
            f"{', '.join(map(repr, rows.column_names))}; set evaluate.by to one of them, or to nothing"
        )
    cells: list[Any] = rows.select_columns([column])[:][column] if len(rows) else []
    empty = [at for at, cell in enumerate(cells) if cell is None or (isinstance(cell, str) and not cell.strip())]
    if empty:
        raise DataError(
            f"{data.source}: column {column!r} is empty in {len(empty)} of {len(cells)} rows "
            f"({places(rows, empty, data)}), but evaluate.by needs a value in each; fill them, or drop these rows"
        )
    odd = [at for at, cell in enumerate(cells) if not isinstance(cell, str | int | float)]
    if odd:
        raise DataError(
            f"{data.source}: column {column!r} holds {type(cells[odd[0]]).__name__} in {places(rows, odd, data)}, but "
            "evaluate.by needs texts or numbers; name another column"
        )
    names = getattr(rows.features[column], "names", None)
    return np.array([names[cell] if names else str(cell).strip() for cell in cells], dtype=object)


def _in_order(rows: Dataset, column: str, values: dict[str, Any]) -> list[str]:
    names = getattr(rows.features[column], "names", None)
    if names:
        return [name for name in names if name in values]
    is_number = rows.features[column].dtype != "string" and "string" not in str(rows.features[column].dtype)
    return sorted(values, key=float) if is_number else sorted(values)
