"""Rows from a Python program: lists of dicts, pandas tables and data sets, as one table or as one for each client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = "a list of dicts, a pandas DataFrame or a datasets.Dataset"


def table(rows: Any, what: str = "data") -> Dataset:
    """The rows as a `datasets.Dataset`.

    Args:
        rows: a list of dicts, a pandas DataFrame or a `datasets.Dataset`.
        what: name of the rows in error messages.

    Raises:
        DataError: the rows are of another kind, there are none, or the values of a column do not fit together.
    """
    import datasets
    import pandas as pd

    if isinstance(rows, datasets.Dataset):
        found = rows
    elif isinstance(rows, pd.DataFrame):
        odd = next((name for name in rows.columns if not isinstance(name, str)), None)
        if odd is not None:
            raise DataError(f"{what}: the DataFrame has a column named {odd!r}, expected texts as names; rename it")
        found = _of_columns({name: rows[name].tolist() for name in rows.columns}, what) if len(rows) else None
    elif _is_rows(rows):
        names = dict.fromkeys(name for row in rows for name in row)
        found = _of_columns({name: [row.get(name) for row in rows] for name in names}, what)
    elif isinstance(rows, list | tuple) and not rows:
        found = None
    else:
        raise DataError(f"{what}: got {_described(rows)}, expected {_KINDS}")
    if found is None or not len(found):
        raise DataError(f"{what}: holds no rows; one example per row is expected")
    return found


def is_per_client(data: Any) -> bool:
    """Whether the data is a table for each client, and not one table."""
    return isinstance(data, Mapping) or (isinstance(data, list | tuple) and bool(data) and not _is_row(data[0]))


def joined(data: Mapping[Any, Any] | Sequence[Any]) -> tuple[Dataset, str, int]:
    """The tables of all clients as one table, the name of its column with each row's client, and the number of clients.

    Args:
        data: a table for each client, as a list, or as a dictionary whose keys are the clients' ids from 0 on.

    Raises:
        DataError: the keys are not such ids, the tables have different columns, or `table` refuses one of them.
    """
    import datasets

    if isinstance(data, Mapping):
        if not data or sorted(data, key=str) != sorted(range(len(data)), key=str):
            shown = ", ".join(repr(key) for key in list(data)[:5]) or "none"
            raise DataError(
                f"data: got a mapping with the keys {shown}, expected the ids of the clients, 0 to "
                f"{max(1, len(data)) - 1}, with the rows of each; for one table give {_KINDS}"
            )
        data = [data[client] for client in range(len(data))]
    tables = [table(rows, f"data: client {client}") for client, rows in enumerate(data)]
    first = tables[0].column_names
    for client, rows in enumerate(tables):
        odd = sorted(set(first) ^ set(rows.column_names))
        if odd:
            lacks = client if odd[0] in first else 0
            raise DataError(
                f"data: client {lacks} has no column {odd[0]!r}, which client {0 if lacks else client} has; give all "
                "clients the same columns"
            )
    column = "client"
    while column in first:
        column += "_"
    try:
        whole = datasets.concatenate_datasets([rows.select_columns(first) for rows in tables])
    except (ValueError, TypeError):
        odd = [name for name in first if len({str(rows.features[name]) for rows in tables}) > 1]
        raise DataError(
            f"data: the values of {', '.join(map(repr, odd))} are not of one kind in the tables of all clients; make "
            "them alike"
        ) from None
    numbers = [client for client, rows in enumerate(tables) for _ in range(len(rows))]
    return whole.add_column(column, numbers), column, len(tables)  # pyright: ignore[reportCallIssue]


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_rows(rows: Any) -> bool:
    """Whether this is a list in which every item is a dict with texts as keys."""
    return isinstance(rows, list | tuple) and bool(rows) and all(_is_row(row) and _texts(row) for row in rows)


def _texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _of_columns(columns: Mapping[str, list[Any]], what: str) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError, OverflowError):  # their messages quote what a row holds
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise DataError(
                f"{what}: column {name!r} holds values that do not make one column, of type {' and '.join(kinds)}; "
                "make them alike"
            ) from None
    if not arrays:
        raise DataError(f"{what}: the rows have no columns")
    return Dataset(pa.table(arrays))


def _described(rows: Any) -> str:
    if isinstance(rows, list | tuple):
        at = next((at for at, row in enumerate(rows) if not (_is_row(row) and _texts(row))), 0)
        kind = "a dict whose keys are no texts" if _is_row(rows[at]) else f"{type(rows[at]).__name__} in place {at}"
        return f"a {type(rows).__name__} with {kind}"
    return f"{type(rows).__module__}.{type(rows).__name__}".removeprefix("builtins.")
