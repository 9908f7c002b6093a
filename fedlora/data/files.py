"""Reads JSON, CSV and Parquet files as tables. Errors name the line; texts that look like dates or numbers stay texts.

No error message quotes a row, since messages get into logs and to servers.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import DataError

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
_NULL = re.compile(rb"^\s*null", re.MULTILINE)  # a null in place of a row crashes pyarrow
_BEYOND = 2.0**63  # an integer that does not fit 64 bits is read as a float, which changes its value
_LARGEST = 2**31 - 1  # bytes of a block in pyarrow, and of a cell in csv
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SHEETS = (".xlsx", ".xls", ".ods")
_NAMES = MappingProxyType({",": "a comma", ";": "a semicolon", "\t": "a tab"})


def kind_of(path: Path) -> str:
    """The file's ending, one of `SUFFIXES`, with `.gz` ignored; empty if it has another ending."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return suffix if (suffix := inner.suffix.lower()) in _READERS else ""


def read(path: Path, texts: Sequence[str]) -> pa.Table:
    """The rows of a file whose name ends in one of `SUFFIXES`, or in one of them and `.gz`.

    Args:
        path: path of the file.
        texts: names of columns that hold text, even if it looks like numbers; used for formats without types.

    Raises:
        DataError: there is no such file, or it cannot be parsed; the message names the line if there is one.
    """
    import pyarrow as pa

    kind = kind_of(path)
    if not kind:
        sheet = "; save the sheet as CSV (UTF-8)" if path.suffix.lower() in _SHEETS else ""
        raise DataError(
            f"{path}: cannot be read as data, expected a file that ends in {', '.join(SUFFIXES)}, or in one of them "
            f"and .gz{sheet}"
        )
    try:
        table = _READERS[kind](path, texts)
        table.validate(full=True)  # finds text that is not UTF-8
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        place = _bad_line(path) if kind in _JSON else ""
        raise DataError(f"{path}: {place or error}") from None
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: column {twice[0]!r} occurs {_times(table.column_names, twice[0])}; rename all but one"
        )
    return table


@lru_cache(maxsize=4)
def line_numbers(path: Path, changed: int) -> tuple[int, ...]:
    """The number of the line on which each row begins; empty for Parquet, and for JSON files with one list of objects.

    Args:
        path: path of a file that can be read.
        changed: the file's `st_mtime_ns`, so that the cached result is not used for a changed file.
    """
    kind = kind_of(path)
    if kind in _JSON:
        data = _content(path)
        lines = [] if data.lstrip()[:1] == b"[" else data.split(b"\n")
        return tuple(number for number, line in enumerate(lines, start=1) if line.strip())
    if kind in _TABLES:
        text = _content(path).decode("utf-8")
        return tuple(number for number, _ in _records(text, _delimiter(text, kind)))[1:]
    return ()


def _times(names: Sequence[str], name: str) -> str:
    """How often and where a column occurs in the header."""
    at = [str(place) for place, other in enumerate(names, start=1) if other == name]
    return f"{'twice' if len(at) == 2 else f'{len(at)} times'} (columns {', '.join(at)})"


def _content(path: Path) -> bytes:
    """The content of a text file as UTF-8, unpacked and without a byte order mark.

    Raises:
        ValueError: the file has another encoding or is not valid gzip data; the message says what to do.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise ValueError("is not whole gzip data; pack it again, or give the file unpacked") from None
    if data.startswith(_UTF16):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-16; save the file as UTF-8") from None
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data[:1024]:
        raise ValueError("holds zero bytes, as UTF-16 without a byte order mark does; save the file as UTF-8")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not UTF-8 (of older Windows programs?); save the file as UTF-8, or convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        ) from None
    return data


def _read_json(path: Path, texts: Sequence[str]) -> pa.Table:
    """One object per line, or one list of objects."""
    import pyarrow as pa

    data = _content(path)
    if _NULL.search(data) and _bad_line(path):
        raise ValueError("not only objects")  # the caller's message says where
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
        except pa.ArrowInvalid:  # large numbers that are not integers
            continue
    return table


def _parsed(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    import pyarrow.json

    # One block, so that a column's type fits the whole file, and a line may have any length.
    size = min(max(len(data) + 1, 1 << 20), _LARGEST)
    return pyarrow.json.read_json(
        io.BytesIO(data),
        read_options=pyarrow.json.ReadOptions(block_size=size),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema),
    )


def _typed(schema: pa.Schema, table: pa.Table | None = None) -> pa.Schema:
    """The schema with text in place of times and, if a table is given, with exact types for integers beyond 64 bits."""
    import pyarrow as pa

    return pa.schema([_typed_field(field, table and table[field.name]) for field in schema])


def _typed_field(field: pa.Field, values: pa.ChunkedArray | None) -> pa.Field:
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made when it is imported, unknown to a type checker
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
    """A CSV file with a header. Its delimiter is the comma, semicolon or tab, whichever occurs most in the header."""
    import pyarrow as pa
    import pyarrow.csv

    data = _content(path)
    text = data.decode("utf-8")
    between = _delimiter(text, kind_of(path))
    try:
        return pyarrow.csv.read_csv(
            io.BytesIO(data),
            # One block, so that a column's type fits the whole file.
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=min(max(len(data) + 1, 1 << 20), _LARGEST)
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=between, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in texts}),
        )
    except pa.ArrowInvalid as error:  # its text quotes the row
        records = _records(text, between)
        wide = len(next(records, (0, []))[1])
        for line, cells in records:
            if len(cells) != wide:
                raise ValueError(
                    f"line {line} has {len(cells)} cells, but the header has {wide}, with {_NAMES[between]} between "
                    f"them; put a text with {_NAMES[between]}, a quote or a line break in double quotes"
                ) from None
        raise ValueError(str(error) if str(error).startswith("Empty") else "cannot be read as CSV") from None


def _delimiter(text: str, kind: str) -> str:
    """The delimiter, judged by the header."""
    header = re.sub(r'"[^"]*"', "", text.lstrip().partition("\n")[0])
    return max("\t,;" if kind == ".tsv" else ",;\t", key=header.count)  # max takes the first of equal ones


def _records(text: str, between: str) -> Iterator[tuple[int, list[str]]]:
    """For the header and each row, the number of the line on which it begins, and its cells."""
    csv.field_size_limit(_LARGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between)
    line = 1
    for cells in reader:
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _read_parquet(path: Path, texts: Sequence[str]) -> pa.Table:
    import pyarrow.parquet

    packed = path.suffix.lower() == ".gz"
    return pyarrow.parquet.read_table(io.BytesIO(gzip.decompress(path.read_bytes())) if packed else path)


_JSON, _TABLES = (".jsonl", ".json"), (".csv", ".tsv")
_READERS: Mapping[str, Callable[[Path, Sequence[str]], pa.Table]] = MappingProxyType(
    {**dict.fromkeys(_JSON, _read_json), **dict.fromkeys(_TABLES, _read_csv), ".parquet": _read_parquet}
)
SUFFIXES = tuple(_READERS)


def _bad_line(path: Path) -> str:
    """The fault of the first row that is not a JSON object, or that has other types than earlier rows; else empty."""
    if not path.is_file():
        return ""
    try:
        data = _content(path)
    except ValueError:  # already in the caller's error
        return ""
    seen: dict[str, tuple[str, str]] = {}
    for place, row, problem in _rows(data):
        if problem:
            return f"{place} is not {problem}"
        if not isinstance(row, dict):
            return f"{place} holds {_WORDS[type(row)]}; one object per line, or a list of objects, is expected"
        for column, word in _kinds("", row):
            before = seen.setdefault(column, (word, place))
            if word != before[0]:
                return f"{place}: {column!r} holds {word}, but {before[0]} in {before[1]}; use one type in all rows"
    return ""


def _rows(data: bytes) -> Iterator[tuple[str, Any, str]]:
    """For each row its place, its value, and the fault if it cannot be read."""
    lines = data.split(b"\n")
    if data.lstrip()[:1] == b"[":
        try:
            for number, row in enumerate(json.loads(data), start=1):
                yield f"row {number}", row, ""
            return
        except json.JSONDecodeError as error:
            if not (error.msg == "Extra data" and lines[0].rstrip().endswith(b"]")):  # a list on every line
                yield f"line {error.lineno}, column {error.colno}", None, f"JSON: {error.msg}"
                return
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield f"line {number}", json.loads(line), ""
        except json.JSONDecodeError as error:
            what = f"JSON: {error.msg}; one object per line is expected"
            yield f"line {number}, column {error.colno}", None, what


def _kinds(column: str, value: Any) -> Iterator[tuple[str, str]]:
    """The name and kind of every column of a row, and of every field and item within it."""
    if column and value is not None:
        yield column, _WORDS[type(value)]
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _kinds(f"{column}.{name}" if column else name, inner)
    for item in value if isinstance(value, list) else ():
        yield from _kinds(f"{column}[]", item)
