"""The places of rows in their file, with which messages name rows instead of quoting them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import DataConfig

from . import files

if TYPE_CHECKING:
    from datasets import Dataset

_MOST = 5  # largest number of rows that a message names one by one


def with_places(rows: Dataset) -> Dataset:
    """The same rows with an index, by which they know their places however they are selected from now on."""
    import pyarrow as pa
    from datasets import Dataset

    if getattr(rows, "_indices", None) is not None:
        rows = rows.flatten_indices()
    return Dataset(
        rows.data, info=rows.info, indices_table=pa.table({"indices": pa.array(range(len(rows)), pa.uint64())})
    )


def places(rows: Dataset, at: Sequence[int], data: DataConfig) -> str:
    """The places of some rows in their source, for messages: "line 4"; "rows 2, 3, 5, 7, 11 and 40 more"; "file a/3".

    Args:
        rows: rows of `data.source`, selected in any way.
        at: numbers of the wanted rows among `rows`, at least one.
        data: the section data, which names the source.
    """
    indices: Any = getattr(rows, "_indices", None)  # the index of selected rows, which is private in datasets
    origins = sorted(indices.column(0)[i].as_py() if indices is not None else i for i in at)
    path = Path(data.source).expanduser()
    lines: tuple[int, ...] = ()
    if files.kind_of(path) and path.is_file():
        lines = files.line_numbers(path, path.stat().st_mtime_ns)
    by_line = len(lines) == len(rows.data)
    word = "line" if by_line else "row"
    shown = [str(lines[i] if by_line else i + 1) for i in origins[:_MOST]]
    if path.is_dir() and data.image_column in rows.column_names:
        images = rows.data.column(data.image_column)
        named = [images[i].as_py()["path"] for i in origins[:_MOST]]
        if all(named):  # not if a packaged set has the folder's name
            word, shown = "file", [str(Path(name).relative_to(path)) for name in named]
    more = f"{len(origins) - _MOST} more" if len(origins) > _MOST else shown.pop() if len(shown) > 1 else ""
    return f"{word}{'s' if len(origins) > 1 else ''} {', '.join(shown)}{f' and {more}' if more else ''}"
