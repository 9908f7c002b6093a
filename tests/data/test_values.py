"""The rows of each value of a column: which they are, their order, and what is said about columns that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from fedlora.common.errors import DataError
from fedlora.config import DataConfig
from fedlora.data import split_rows
from fedlora.data.places import with_places
from fedlora.data.values import rows_by_value, values_without_rows

DATA = DataConfig(source="mine.jsonl", partition="iid", heldout_max=0)


def rows(**columns: list[Any]) -> Dataset:
    return with_places(Dataset.from_dict(columns))


def test_each_row_is_under_its_value():
    found = rows_by_value(rows(domain=["b", "a", "b", "c"]), "domain", DATA)
    assert {value: at.tolist() for value, at in found.items()} == {"a": [1], "b": [0, 2], "c": [3]}


def test_numbers_ascend_and_classes_have_their_names_in_their_own_order():
    assert list(rows_by_value(rows(year=[10, 9, 100]), "year", DATA)) == ["9", "10", "100"]
    labelled = rows(label=[1, 0, 1]).cast_column("label", ClassLabel(names=["zebra", "ant"]))
    found = rows_by_value(labelled, "label", DATA)
    assert {value: at.tolist() for value, at in found.items()} == {"zebra": [1], "ant": [0, 2]}


@pytest.mark.parametrize(
    ("cells", "column", "words"),
    [
        (["a", "b"], "style", "no column 'style', which evaluate.by names; the columns are 'domain'; set evaluate.by"),
        (["a", " "], "domain", "column 'domain' is empty in 1 of 2 rows .*row 2.*, but evaluate.by needs a value in"),
        (["a", None], "domain", "column 'domain' is empty in 1 of 2 rows"),
        (
            [["a"], ["b"]],
            "domain",
            "column 'domain' holds list in rows 1 and 2, but evaluate.by needs texts or numbers",
        ),
        (
            [str(at) for at in range(51)],
            "domain",
            "evaluate.by = 'domain' has 51 values in 51 held-out rows, .* is 50;",
        ),
    ],
)
def test_a_column_that_does_not_fit_is_one_sentence(cells, column, words):
    with pytest.raises(DataError, match=words) as error:
        rows_by_value(rows(domain=cells), column, DATA)
    assert "\n" not in str(error.value)


def test_fifty_values_are_taken():
    assert len(rows_by_value(rows(domain=[str(at) for at in range(50)]), "domain", DATA)) == 50


def test_values_that_no_held_out_row_has_are_told():
    split = split_rows(rows(domain=["a"] * 30 + ["b"]), DATA, 2, seed=0)
    assert {*split.heldout["domain"]} == {"a"}
    assert values_without_rows(split, "domain", DATA) == ["b"]
    several = split_rows(rows(domain=["a", "b"] * 15), DATA, 2, seed=0)
    assert np.unique(several.heldout["domain"]).tolist() == ["a", "b"]
    assert values_without_rows(several, "domain", DATA) == []
