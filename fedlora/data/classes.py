"""The numbers and names of classes in a label column, which must be the same for all clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import DataError
from fedlora.config import LONGEST_CLASS, DataConfig, label_names

from .conversations import described
from .places import places

if TYPE_CHECKING:
    from datasets import Dataset


def numbered(rows: Dataset, data: DataConfig, names: tuple[str, ...] = ()) -> Dataset:
    """The rows with classes as whole numbers instead of names, texts of digits, or numbers like 1.0; blanks are null.

    Names are numbered in the order of `data.label-names`, or else in alphabetical order over all rows. They stay with
    the column as a `datasets.ClassLabel`.

    Args:
        rows: rows of any clients.
        data: the section data, which names the column.
        names: names of the classes in their order, in place of those in `data`.

    Raises:
        DataError: rows have a name that is not among the given ones; the message says which rows.
    """
    from datasets import ClassLabel, Value

    feature = rows.features.get(data.label_column)
    listed = ", ".join(names) or data.label_names
    names = names or label_names(data)
    if feature is None or data.form not in ("auto", "label", "image"):
        return rows
    cells: list[Any] = rows.with_format("arrow")[:][data.label_column].to_pylist()
    if isinstance(feature, ClassLabel):
        none = [cell is None or cell < 0 for cell in cells]  # hub data sets have -1 for a row without a class
        if (not names or list(names) == feature.names) and all(
            cell is None for cell, no in zip(cells, none, strict=True) if no
        ):
            return rows
        cells = [None if no else feature.names[cell] for cell, no in zip(cells, none, strict=True)]
        names = names or tuple(feature.names)
    if all(cell is None or isinstance(cell, str) for cell in cells):
        words = [cell.strip() or None if cell else None for cell in cells]
        found = {word for word in words if word is not None}
        if found and not found & {*names} and all(word.isdecimal() and len(word) < _DIGITS for word in found):
            return _with_classes(rows, data, [None if word is None else int(word) for word in words], names)
        names = names or tuple(sorted(found))
        numbers = {name: number for number, name in enumerate(names)}
        unknown = [at for at, word in enumerate(words) if word is not None and word not in numbers]
        if unknown:
            raise DataError(
                f"{data.source}: column {data.label_column!r} holds a name that is none of data.label-names = "
                f"{listed!r} in {places(rows, unknown, data)}; correct these rows, or name all classes"
            )
        return _with_classes(rows, data, [None if word is None else numbers[word] for word in words], names)
    if all(cell is None or (isinstance(cell, float) and cell.is_integer()) for cell in cells):
        return _with_classes(rows, data, [None if cell is None else int(cell) for cell in cells], names)
    return _with_classes(rows, data, cells, names) if names and feature in (Value("int64"), Value("int32")) else rows


def check_classes(rows: Dataset, data: DataConfig, labels: int) -> None:
    """Check that every class is a whole number from 0 to `labels` - 1, or blank.

    Args:
        rows: the rows of one client, or held-out rows.
        data: the section data, which names the column.
        labels: number of classes, `model.labels`.

    Raises:
        DataError: a class is something else; the message says in which rows.
    """
    column = data.label_column
    class_names(rows, data, labels)
    cells = rows.select_columns([column])[:][column] if len(rows) else []
    no_numbers = [at for at, cell in enumerate(cells) if cell is not None and not _is_whole(cell)]
    if no_numbers:
        kind = "a number that is not whole" if isinstance(cells[no_numbers[0]], float) else ""
        raise DataError(
            f"{data.source}: column {column!r} holds {kind or described(cells[no_numbers[0]])} in "
            f"{places(rows, no_numbers, data)}, expected a class from 0 to {labels - 1}; convert these rows"
        )
    outside = [at for at, cell in enumerate(cells) if cell is not None and not 0 <= cell < labels]
    found = {int(cell) for cell in cells if cell is not None}
    if outside and found <= {*range(1, labels + 1)}:
        raise DataError(
            f"{data.source}: column {column!r} counts its classes from 1 to {labels}, but classes count from 0; "
            f"subtract 1 from all of them, or name them (data.label-names)"
        )
    if outside:
        raise DataError(
            f"{data.source}: column {column!r} holds classes outside 0 to {labels - 1} in {places(rows, outside, data)}"
            f"; correct these rows, or set model.labels to the number of classes"
        )


def class_names(rows: Dataset, data: DataConfig, labels: int) -> tuple[str, ...]:
    """The names of the classes, in their order; empty if they have only numbers.

    Raises:
        DataError: there are more names than classes, or a name is too long. Since names are sent to the server, this
            also keeps a column of texts that was taken for the label column from leaving a node.
    """
    names = label_names(data) or tuple(getattr(rows.features.get(data.label_column), "names", None) or ())
    column = data.label_column
    if len(names) > labels:
        raise DataError(
            f"{data.source}: column {column!r} has {len(names)} different names, but model.labels = {labels}; set "
            "model.labels to the number of classes, and data.label-names to their names in order"
        )
    longest = max(map(len, names), default=0)
    if longest > LONGEST_CLASS or not all(name.isprintable() for name in names):
        raise DataError(
            f"{data.source}: column {column!r} has names of up to {longest} characters, expected classes of at most "
            f"{LONGEST_CLASS} printable ones; name the right column (data.label-column), or shorten them"
        )
    return names


_DIGITS = 10  # texts with fewer digits may be the number of a class


def _is_whole(cell: Any) -> bool:
    return isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer())


def _with_classes(rows: Dataset, data: DataConfig, cells: Sequence[int | None], names: Sequence[str]) -> Dataset:
    """The rows with these classes, as a `ClassLabel` if each class has a name."""
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, DatasetInfo, Value

    table: pa.Table = rows.with_format("arrow")[:]
    place = table.column_names.index(data.label_column)
    table = table.set_column(place, data.label_column, pa.array(cells, type=pa.int64()))
    features = rows.features.copy()
    named = names and all(cell is None or 0 <= cell < len(names) for cell in cells)
    features[data.label_column] = ClassLabel(names=list(names)) if named else Value("int64")
    return Dataset(table.replace_schema_metadata(None), info=DatasetInfo(features=features))
