"""Files that are whole or not there."""

import json

import pytest

from fedlora import results
from fedlora.config import parse
from fedlora.errors import RunError


def test_numbers_that_are_not_finite_become_null(tmp_path):
    results.write_json(tmp_path / "a.json", {"x": [float("nan"), 1.0], 3: {"y": float("inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.0], "3": {"y": None}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    results.write_json(path, {"round": 1})
    with pytest.raises(TypeError):
        results.write_json(path, {"round": object()})
    assert json.loads(path.read_text()) == {"round": 1}


def test_a_stamp_is_taken_once():
    config = results.stamp(parse({}))
    assert config.run.id
    assert results.stamp(config) == config


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run\.dir: cannot write"):
        results.RunRecord(parse({"run.dir": str(tmp_path / "file")}))
