"""Where rows stand in the file that they were read from: what a message has in place of what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import DataConfig

from . import files

if TYPE_CHECKING:
    from datasets import Dataset

_MOST = 5  # that are named one by one


def with_places(rows: Dataset) -> Dataset:
    """The same rows, which know where they stand however they are selected from now on."""
    import pyarrow as pa
    from datasets import Dataset

    if getattr(rows, "_indices", None) is not None:
        rows = rows.flatten_indices()
    return Dataset(
        rows.data, info=rows.info, indices_table=pa.table({"indices": pa.array(range(len(rows)), pa.uint64())})
    )


def places(rows: Dataset, at: Sequence[int], data: DataConfig) -> str:
    """Where some of these rows stand in their source, for people: "line 4"; "rows 2, 3, 5, 7, 11 and 40 more".

    Args:
        rows: of `data.source`, selected in any way.
        at: places among these rows, at least one.
        data: names the source.
    """
    indices: Any = getattr(rows, "_indices", None)  # of the rows that are selected; datasets keeps it to itself
    origins = sorted(indices.column(0)[i].as_py() if indices is not None else i for i in at)
    path = Path(data.source).expanduser()
    lines: tuple[int, ...] = ()
    if files.kind_of(path) and path.is_file():
        lines = files.line_numbers(path, path.stat().st_mtime_ns)
    by_line = len(lines) == len(rows.data)
    shown = [str(lines[i] if by_line else i + 1) for i in origins[:_MOST]]
    more = f"{len(origins) - _MOST} more" if len(origins) > _MOST else shown.pop() if len(shown) > 1 else ""
    word = f"{'line' if by_line else 'row'}{'s' if len(origins) > 1 else ''}"
    return f"{word} {', '.join(shown)}{f' and {more}' if more else ''}"
