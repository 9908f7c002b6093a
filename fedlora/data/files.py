"""Rows from files: JSON, CSV and Parquet as tables whose texts are texts; what cannot be read is named by its line."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedlora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_WORDS = MappingProxyType(
    {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
)
_BOM = b"\xef\xbb\xbf"
_NULL = re.compile(rb"^\s*null", re.MULTILINE)  # in the place of a row, it ends pyarrow's process
_BEYOND = 2.0**63  # an integer that has no room in 64 bits is read as a float, and is another number then


def read(path: Path, texts: Sequence[str]) -> pa.Table:
    """The rows of a file whose name ends in one of `SUFFIXES`.

    Args:
        path: where it is.
        texts: columns that hold text, whatever it looks like; formats without types are read by this.

    Raises:
        DataError: there is no such file, or it cannot be parsed; names the line where there is one.
    """
    import pyarrow as pa

    try:
        table = _READERS[path.suffix.lower()](path, texts)
        table.validate(full=True)  # finds text that is not UTF-8
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        place = _bad_line(path) if path.suffix.lower() in (".jsonl", ".json") else ""
        raise DataError(f"{path}: {place or error}") from None
    return table


def _read_json(path: Path, texts: Sequence[str]) -> pa.Table:
    """One object per line, or one list of objects."""
    import pyarrow as pa

    data = path.read_bytes().removeprefix(_BOM)
    if _NULL.search(data) and _bad_line(path):
        raise ValueError("not only objects")  # the caller finds out where
    if data.lstrip()[:1] == b"[":
        rows = json.loads(data)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not only objects")
        data = "\n".join(map(json.dumps, rows)).encode() or b"\n"
        if not rows:
            return pa.table({})
    table = _parsed(data)
    for retyped in (_typed(table.schema, table), _typed(table.schema)):
        if retyped == table.schema:
            break
        try:
            return _parsed(data, retyped)
        except pa.ArrowInvalid:  # large numbers that are no integers
            continue
    return table


def _parsed(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    import pyarrow.json

    # One block: a column's type is then that of the whole file, and a line may be of any length.
    size = min(max(len(data) + 1, 1 << 20), 2**31 - 1)
    return pyarrow.json.read_json(
        io.BytesIO(data),
        read_options=pyarrow.json.ReadOptions(block_size=size),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema),
    )


def _typed(schema: pa.Schema, table: pa.Table | None = None) -> pa.Schema:
    """The schema with text for what looked like times; and of a table, with whole numbers beyond 64 bits exact."""
    import pyarrow as pa

    return pa.schema([_typed_field(field, table and table[field.name]) for field in schema])


def _typed_field(field: pa.Field, values: pa.ChunkedArray | None) -> pa.Field:
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # whose functions are made when it is imported
    kind = field.type
    if pa.types.is_timestamp(kind):
        return field.with_type(pa.string())
    if pa.types.is_struct(kind):
        inner = [
            _typed_field(kind.field(i), None if values is None else pc.struct_field(values, [i]))
            for i in range(kind.num_fields)
        ]
        return field.with_type(pa.struct(inner))
    if pa.types.is_list(kind):
        flat = None if values is None else pc.list_flatten(values)
        return field.with_type(pa.list_(_typed_field(kind.value_field, flat)))
    if pa.types.is_float64(kind) and values is not None and (pc.max(pc.abs(values)).as_py() or 0.0) >= _BEYOND:
        return field.with_type(pa.decimal128(38, 0))
    return field


def _read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv

    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # errors name the row only without threads
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in texts}),
    )


def _read_parquet(path: Path, texts: Sequence[str]) -> pa.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


_READERS = MappingProxyType({".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet})
SUFFIXES = tuple(_READERS)


def _bad_line(path: Path) -> str:
    """What is wrong with the first row that is no JSON object, or whose types are others than those before; or ""."""
    if not path.is_file():
        return ""
    seen: dict[str, tuple[str, str]] = {}
    for place, row, problem in _rows(path):
        if problem:
            return f"{place} is not {problem}"
        if not isinstance(row, dict):
            return f"{place} holds {_WORDS[type(row)]}; one object per line, or a list of objects, is expected"
        for column, word in _kinds("", row):
            before = seen.setdefault(column, (word, place))
            if word != before[0]:
                return f"{place}: {column!r} holds {word}, and {before[0]} in {before[1]}; write all of them alike"
    return ""


def _rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Each row's place, the row, and what it is not, where it cannot be read."""
    data = path.read_bytes().removeprefix(_BOM)
    if data.lstrip()[:1] == b"[":
        try:
            for number, row in enumerate(json.loads(data.decode("utf-8")), start=1):
                yield f"row {number}", row, ""
        except UnicodeDecodeError as error:
            yield f"byte {error.start}", None, f"UTF-8: {error.reason}"
        except json.JSONDecodeError as error:
            yield f"line {error.lineno}, column {error.colno}", None, f"JSON: {error.msg}"
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            if line.strip():
                yield f"line {number}", json.loads(line.decode("utf-8")), ""
        except UnicodeDecodeError as error:
            yield f"line {number}", None, f"UTF-8: {error.reason} at byte {error.start}"
        except json.JSONDecodeError as error:
            what = f"JSON: {error.msg}; one object per line is expected"
            yield f"line {number}, column {error.colno}", None, what


def _kinds(column: str, value: Any) -> Iterator[tuple[str, str]]:
    """What every column of a row holds, and what every field and item within it does."""
    if column and value is not None:
        yield column, _WORDS[type(value)]
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _kinds(f"{column}.{name}" if column else name, inner)
    for item in value if isinstance(value, list) else ():
        yield from _kinds(f"{column}[]", item)
