"""Packaged sets hold what they are known to hold; files are read or refused by line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError

from fedlora.common.errors import DataError
from fedlora.config import DataConfig
from fedlora.data import load_rows, sources, split_rows

ROWS = [{"prompt": "a", "response": "b\nc", "who": "x"}, {"prompt": "ü", "response": "", "who": "y"}]


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    return tmp_path


def write(path: Path, content: str | bytes) -> DataConfig:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataConfig(source=str(path))


def test_chitchat_pairs_turns(packaged: Path) -> None:
    said = [[("A", "hi"), ("A", " you? ")], [("B", " ")], [("A", "there")], [("B", "yes")], [("C", "me too")]]
    messages = [[{"sender": s, "text": t, "timestamp": ""} for s, t in group] for group in said]
    alone = [[{"sender": "A", "text": "anyone?", "timestamp": ""}]]
    conversations = {"1": {"messages": messages}, "2": {"messages": alone}}
    (packaged / "dataset.json").write_text(json.dumps(conversations))
    assert load_rows(DataConfig(source="chitchat")).to_list() == [
        {"prompt": "hi\nyou?\nthere", "response": "yes", "sender": "B"},
        {"prompt": "yes", "response": "me too", "sender": "C"},
    ]


def test_sentiment_drops_the_neutral(packaged: Path) -> None:
    for name in ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"):
        content = f'1_1\t0.6\tgood "{name}\r\n1_2\t0.5\tso\r\n1_3\t-0.5\tso\r\n1_4\t-3.9\tclich\u00e9\u0085d\tbad\r\n'
        (packaged / f"{name}_GroundTruth.txt").write_bytes(content.encode())
    rows = load_rows(DataConfig(source="sentiment"))
    assert rows.to_list()[:2] == [
        {"text": 'good "amazonReviewSnippets', "label": 1, "domain": "amazon"},
        {"text": "clich\u00e9\u0085d\tbad", "label": 0, "domain": "amazon"},
    ]
    assert rows["domain"][::2] == ["amazon", "movies", "nyt", "tweets"]
    assert rows.features["label"].names == ["negative", "positive"]


def test_chatterbot_pairs_lines(packaged: Path) -> None:
    (packaged / "english").mkdir()
    (packaged / "english" / "food.yml").write_text(yaml.dump({"categories": ["x"], "conversations": [["a", "b", "c"]]}))
    assert load_rows(DataConfig(source="chatterbot")).to_list() == [
        {"prompt": "a", "response": "b", "topic": "food"},
        {"prompt": "b", "response": "c", "topic": "food"},
    ]


@pytest.mark.slow
def test_chitchat() -> None:
    rows = load_rows(DataConfig(source="chitchat"))
    senders = Counter(rows["sender"])
    assert len(rows) == 131_548
    assert len(senders) == 1_113  # of 1,315 senders, those who ever answered someone
    assert senders.most_common(1) == [("31267496-e50f-4f91-a197-c5b1bfde803b", 12_214)]
    assert all(text.strip() == text and text for name in ("prompt", "response") for text in rows[name])


@pytest.mark.slow
def test_sentiment() -> None:
    rows = load_rows(DataConfig(source="sentiment"))
    assert Counter(rows["domain"]) == {"movies": 10_043, "tweets": 3_362, "amazon": 2_943, "nyt": 2_788}
    assert Counter(rows["label"]) == {0: 9_029, 1: 10_107}
    assert any("clich\u00e9s" in text for text in rows["text"])


@pytest.mark.slow
def test_chatterbot() -> None:
    rows = load_rows(DataConfig(source="chatterbot"))
    assert len(rows) == 2_393
    assert len(set(rows["topic"])) == 21


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_files_of_each_kind_give_equal_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        path.write_text('prompt,response,who\na,"b\nc",x\nü,,y\n', encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    rows = load_rows(DataConfig(source=str(path)))
    assert rows.to_list() == ROWS
    assert not rows.cache_files


def test_csv_text_stays_text(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "sums.csv", "prompt,response,label\n1+2,3,0\n2+2,4,1\n"))
    assert rows.to_list()[0] == {"prompt": "1+2", "response": "3", "label": 0}


@pytest.mark.parametrize(
    "values",
    [
        ["2020-01-01", "2021-05-05"],
        ["2020-01-01 10:00:00", None],
        [True, False, None],
        [1, 2.5, None],
        [2**63, 3, None, -(2**100)],
        [1e300, 0.5],
        [{"at": "2020-01-01", "n": 2**64, "more": {"z": "1999-12-31"}}, None],
        [[{"value": "2020-01-01 10:00:00"}], [], None],
        ["", " ", "null", "true", "1", "NaN"],
        [None, None],
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_json_values_stay_what_they_are(tmp_path: Path, values: list[Any], form: str) -> None:
    found = [{"a": value, "row": number} for number, value in enumerate(values)]
    text = json.dumps(found, indent=1) if form == "list" else "\n".join(map(json.dumps, found))
    assert load_rows(write(tmp_path / "rows.json", text)).to_list() == found


def test_large_numbers_are_keys_of_their_own(tmp_path: Path) -> None:
    """As floats they would be one client."""
    lines = [json.dumps({"text": "a", "who": 2**64 + number % 3}) for number in range(12)]
    config = replace(write(tmp_path / "rows.jsonl", "\n".join(lines)), partition_by="who", heldout_fraction=0.0)
    assert split_rows(load_rows(config), config, 3, 0).names == tuple(str(2**64 + number) for number in range(3))


def test_csv_texts_of_instructions_stay_text(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "sums.csv", "instruction,input,output\nadd,12,2020-01-01\n"))
    assert rows.to_list() == [{"instruction": "add", "input": "12", "output": "2020-01-01"}]


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "long.jsonl", json.dumps({"text": "x" * 3_000_000}) + '\n{"text": "y"}'))
    assert [len(text) for text in rows["text"]] == [3_000_000, 1]


def test_class_names_are_numbered_over_the_whole_set(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "rows.csv", "text,label\na,spam\nb,ham\nc,spam\nd,eggs\n"))
    assert rows["label"][:] == [2, 1, 2, 0]
    assert rows.features["label"].names == ["eggs", "ham", "spam"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"a\.jsonl: line 3, column \d+ is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl: line 2 holds a list; one object per line"),
        ("a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl: line 2 holds null; one object per line"),
        ("a.jsonl", "null\n", r"a\.jsonl: line 1 holds null; one object per line"),
        ("a.json", '[\n{"a": 1},\n]\n', r"a\.json: line 3, column 1 is not JSON"),
        ("a.json", '[{"a": 1}, "x"]', r"a\.json: row 2 holds text; one object per line, or a list of objects"),
        ("a.json", b'[{"a": "\xe9"}]', r"a\.json: line 1 is not UTF-8 .*; save the file as UTF-8"),
        ("a.json", "[]", r"a\.json: holds no rows"),
        ("a.json", '[{"a": 1}, {"a": "x"}]', r"a\.json: row 2: 'a' holds text, but a number in row 1; use one type"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', r"a\.jsonl: line 2 is not UTF-8"),
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": "x"}\n',
            r"line 3: 'a' holds text, but a number in line 1; use one type in all rows",
        ),
        ("a.jsonl", '{"a": true}\n{"a": 1}\n', r"line 2: 'a' holds a number, but true or false in line 1"),
        ("a.jsonl", '{"a": [{"b": 1}, {"b": {}}]}', r"line 1: 'a\[\]\.b' holds an object, but a number in line 1"),
        ("a.jsonl", '{"a": 1, "a": 2}', r"a\.jsonl: .*Column\(/a\) was specified twice"),
        (
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            r"a\.csv: line 3 has 3 cells, but the header has 2, with a comma between them; put",
        ),
        ("a.csv", b"text,b\nx,2\n\xe9,2\n", r"a\.csv: line 3 is not UTF-8 .* iconv -f WINDOWS-1252 -t UTF-8 a\.csv"),
        ("a.parquet", "no parquet", r"a\.parquet: "),
        ("a.txt", "text", r"a\.txt: cannot be read as data, expected .*\.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("a.jsonl", "", r"a\.jsonl: Empty JSON file"),
        ("a.csv", "", r"a\.csv: Empty CSV file"),
        ("a.csv", "text,label\n", r"a\.csv: holds no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, content))


def test_a_missing_file_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        load_rows(DataConfig(source=str(tmp_path / "rows.jsonl")))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        load_rows(DataConfig(source=str(tmp_path / "rows.jsonl")))


def test_a_misspelled_set_is_suggested_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"unknown packaged set 'chitchatt'; did you mean 'chitchat'\?"):
        load_rows(DataConfig(source="chitchatt"))


def test_hub_gets_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows(DataConfig(source="owner/name", subset="en", split="test", revision="v2")).to_list() == ROWS
    assert load_rows(DataConfig(source="owner/name")).to_list() == ROWS
    assert asked == [
        (("owner/name", "en"), {"split": "test", "revision": "v2"}),
        (("owner/name", None), {"split": "train", "revision": None}),
    ]


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach 'owner/name' on the Hub"),
        ValueError('Unknown split "trian"'),
    ],
)
def test_hub_errors_name_the_source(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'owner/name' is neither a packaged set .*data\.split = 'trian'") as caught:
        load_rows(DataConfig(source="owner/name", split="trian"))
    assert str(error) in str(caught.value)


@pytest.mark.parametrize("there", [True, False])
def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """What was fetched before is used, and else it is said; in no case is the hub asked again and again."""
    asked: list[str] = []

    def info(self: object, name: str, **kwargs: object) -> None:
        asked.append(name)
        raise httpx.ConnectError("Name or service not known")

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        if there:
            return datasets.Dataset.from_list(ROWS)
        raise ConnectionError("Couldn't find it in the cache")

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    if there:
        assert load_rows(DataConfig(source="owner/name")).to_list() == ROWS
    else:
        with pytest.raises(
            DataError, match=r"'owner/name' is neither a packaged set .*, and the hub cannot be reached"
        ):
            load_rows(DataConfig(source="owner/name"))
    assert asked == ["owner/name"]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_without_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    with pytest.raises(DataError, match=r"data\.split: 'owner/name' needs one split, such as one of train"):
        load_rows(DataConfig(source="owner/name", split=""))
