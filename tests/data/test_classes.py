"""What a label column means: names by their list or the alphabet, digits as numbers, blanks as none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedlora.common.errors import ConfigError, DataError
from fedlora.config import Config, DataConfig, parse
from fedlora.data import class_names, load_rows, split_rows
from fedlora.data.classes import numbered
from fedlora.tasks.classification import Classification
from fedlora.tasks.registry import check_task


def written(folder: Path, labels: list[Any], names: str = "") -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels), encoding="utf-8")
    return DataConfig(source=str(path), label_names=names)


@pytest.mark.parametrize(
    ("labels", "names", "classes", "called"),
    [
        (["b", "a", "b"], "", [1, 0, 1], ("a", "b")),
        (["b", " a", "b "], "c, b,a", [1, 2, 1], ("c", "b", "a")),
        (["b", "", None, "  "], "", [0, None, None, None], ("b",)),
        ([2, 0, 1], "c,b,a", [2, 0, 1], ("c", "b", "a")),
        (["10", "2", ""], "", [10, 2, None], ()),
        (["1", "0"], "no,yes", [1, 0], ("no", "yes")),
        (["1", "0"], "1,0", [0, 1], ("1", "0")),
        ([1.0, 0.0, None], "", [1, 0, None], ()),
        ([1.0, 0.0, None], "no,yes", [1, 0, None], ("no", "yes")),
        ([1.0, 1.5], "", [1.0, 1.5], ()),
    ],
)
def test_labels(tmp_path: Path, labels: list[Any], names: str, classes: list[Any], called: tuple[str, ...]) -> None:
    config = written(tmp_path, labels, names)
    rows = load_rows(config)
    assert rows["label"][:] == classes
    assert class_names(rows, config, 11) == called


def test_csv_cells_that_are_blank_are_no_class(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,benign\nb,\nc,malignant\n", encoding="utf-8")
    rows = load_rows(DataConfig(source=str(tmp_path / "rows.csv")))
    assert rows["label"][:] == [0, None, 1]
    assert rows.features["label"].names == ["benign", "malignant"]


def test_a_name_that_is_not_in_the_list_is_named_by_its_line(tmp_path: Path) -> None:
    config = written(tmp_path, ["benign", "secret", "malignant", "secret"], "benign,malignant")
    with pytest.raises(DataError, match=r"none of data\.label-names = 'benign,malignant' in lines 2 and 4") as caught:
        load_rows(config)
    assert "secret" not in str(caught.value)


def test_a_sets_own_names_follow_the_list() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": ["pos", "neg"]}, features=features)
    assert numbered(rows, DataConfig(source="s"))["label"][:] == [1, 0]
    assert numbered(rows, DataConfig(source="s", label_names="pos,neg"))["label"][:] == [0, 1]


@pytest.mark.parametrize("names", ["", "neg,pos"])
def test_a_row_of_a_hub_set_without_a_class_has_none(names: str) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    found = numbered(rows, DataConfig(source="s", label_names=names))
    assert found["label"][:] == [1, None]
    assert found.features["label"].names == ["neg", "pos"]


@pytest.mark.parametrize("text", ["a", "a,,b", "a,b,a", ","])
def test_a_list_of_names_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.label-names: got .*, expected two or more different names"):
        parse({"data.label-names": text, "model.task": "classification"}, Config())


def test_as_many_names_as_classes() -> None:
    keys = {"data.label-names": "a,b,c", "model.task": "classification"}
    with pytest.raises(ConfigError, match=r"names 3 classes, but model\.labels = 2; make them agree"):
        check_task(parse(keys, Config()))
    assert check_task(parse({**keys, "model.labels": 3}, Config())) == Classification(3)
    assert parse({**keys, "model.labels": 3}, Config()).data.label_names == "a,b,c"


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_blank_key_is_no_client(tmp_path: Path, blank: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    keys = ["north", blank, "south", blank, "north", "south"]
    path.write_text("".join(json.dumps({"text": "a", "who": key}) + "\n" for key in keys), encoding="utf-8")
    config = DataConfig(source=str(path), partition_by="who", heldout_fraction=0.0)
    with pytest.raises(DataError, match=r"'who' is empty in 2 of 6 rows \(lines 2 and 4\), but data\.partition"):
        split_rows(load_rows(config), config, 2, 0)
    plain = replace(config, partition="iid")
    assert split_rows(load_rows(plain), plain, 2, 0).names == ()
