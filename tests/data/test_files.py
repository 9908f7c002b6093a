"""Files as people have them: packed, with tabs or semicolons, from older programs; read, or refused with the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.common.errors import DataError
from fedlora.config import DataConfig
from fedlora.data import load_rows
from fedlora.data.places import places

ROWS = [{"text": "fièvre; oui, élevée", "label": 1}, {"text": "non\nrien", "label": 0}]
TABLE = '"fièvre; oui, élevée"{0}1\n\n"non\nrien"{0}0\n'
LINES = "\n".join(map(json.dumps, ROWS))


def write(path: Path, content: str | bytes) -> DataConfig:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(source=str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text;label\n" + TABLE.format(";")),
        ("a.csv", "text\tlabel\n" + TABLE.format("\t")),
        ("a.tsv", "text\tlabel\n" + TABLE.format("\t")),
        ("a.TSV", "\ufefftext\tlabel\r\n" + TABLE.format("\t").replace("1\n", "1\r\n")),
        ("a.csv", ("text,label\n" + TABLE.format(",")).encode("utf-16")),
        ("a.csv.gz", gzip.compress(("text,label\n" + TABLE.format(",")).encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-16")),
        ("a.jsonl", json.dumps(ROWS)),
    ],
)
def test_files_are_read_however_they_were_saved(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert load_rows(write(tmp_path / name, content)).to_list() == ROWS


def test_packed_parquet(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    packed = gzip.compress(sink.getvalue().to_pybytes(), mtime=0)
    assert load_rows(write(tmp_path / "a.parquet.gz", packed)).to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,label\nSmith,1\nfièvre,0\n".encode("cp1252"), r"line 3 is not UTF-8 .*iconv -f WINDOWS-1252"),
        ("a.jsonl", '{"text": "Smith"}\n{"text": "fièvre"}\n'.encode("cp1252"), r"line 2 is not UTF-8 .*save the file"),
        ("a.csv", "text,label\nSmith,1\n".encode("utf-16-le"), r"holds zero bytes, as UTF-16 .*save the file as UTF-8"),
        ("a.csv", "text,label\nSmith,1\n".encode("utf-16")[:-1], r"byte 38 is not UTF-16; save the file as UTF-8"),
        ("a.csv.gz", b"text,label\nSmith,1\n", r"is not whole gzip data"),
        ("a.csv.gz", gzip.compress(b"text,label\nSmith,1\n" * 99, mtime=0)[:-9], r"is not whole gzip data"),
        ("a.csv", "text,label,text\nSmith,1,x\n", r"column 'text' occurs twice \(columns 1, 3\); rename all but one"),
        (
            "a.csv",
            "text,label\nSmith, John,1\n",
            r"line 2 has 3 cells, but the header has 2, with a comma between them",
        ),
        ("a.csv", 'text;label\n"Smith\n\nx";1\nSmith\n', r"line 5 has 1 cells, but the header has 2, with a semicolon"),
        ("a.jsonl", '["Smith"]\n["x"]\n', r"line 1 holds a list; one object per line"),
        ("a.xlsx", b"PK", r"cannot be read as data, .*; save the sheet as CSV \(UTF-8\)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    with pytest.raises(DataError, match=rf"{name}: {says}") as caught:
        load_rows(write(tmp_path / name, content))
    assert "Smith" not in str(caught.value)


def test_a_columns_type_is_that_of_the_whole_file(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.csv", "text,stars\n" + "a,1\n" * 400_000 + "b,good\n"))
    assert rows[400_000] == {"text": "b", "stars": "good"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "\n" + LINES.replace("\n", "\n\n"), ["line 2", "line 4", "lines 2 and 4"]),
        ("a.csv", "text,label\n" + TABLE.format(","), ["line 2", "line 4", "lines 2 and 4"]),
        ("a.json", json.dumps(ROWS, indent=1), ["row 1", "row 2", "rows 1 and 2"]),
    ],
)
def test_rows_are_named_by_their_lines_however_they_are_selected(
    tmp_path: Path, name: str, content: str, said: list[Any]
) -> None:
    config = write(tmp_path / name, content)
    rows = load_rows(config)
    assert [places(rows, [0], config), places(rows, [1], config), places(rows, [1, 0], config)] == said
    last = rows.select([1, 0]).select(range(1)).select([0])
    assert places(last, [0], config) == said[1]
    assert places(rows.select(range(1, 2)), [0], config) == said[1]


def test_many_places_are_counted() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a"] * 60})
    assert places(rows, range(1, 60, 2), DataConfig(source="owner/name")) == "rows 2, 4, 6, 8, 10 and 25 more"
