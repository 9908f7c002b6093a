"""Files that are whole or not there."""

import io
import json

import pytest
from rich.console import Console

from fedlora.common.errors import RunError
from fedlora.config import parse
from fedlora.results import record as results
from fedlora.results import run_folder
from fedlora.results.display import result_table


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
    config = run_folder.stamp(parse({}))
    assert config.run.id
    assert run_folder.stamp(config) == config


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run\.dir: cannot write"):
        results.RunRecord(parse({"run.dir": str(tmp_path / "file")}))


def test_the_table_of_rounds_fits_a_terminal_of_80_columns(tmp_path):
    entry = {
        "round": 1,
        "heldout": {"loss": 4.2657, "accuracy": 0.2395},
        "train-loss": 4.5199,
        "clients": {"0": {}, "1": {}},
        "upload-bytes": 16_700_000,
        "download-bytes": 83_200_000,
        "codec-error": None,
        "aggregation-error": 3e-9,
        "drift": 0.751,
        "effective-rank": 14.84,
    }
    config = parse({}).to_flat()
    data = {"config": config, "status": "completed", "baseline": {"loss": 4.9137, "accuracy": 0.21}, "rounds": [entry]}
    results.write_json(tmp_path / "result.json", data)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table(tmp_path))
    shown = console.export_text()
    assert "…" not in shown
    assert all(
        word in shown for word in ("4.9137", "4.2657", "0.2395", "4.5199", "16.7", "83.2", "< 1e-7", "0.75", "14.8")
    )


def test_a_runs_folder_is_its_owners_alone(tmp_path):
    record = results.RunRecord(parse({"run.dir": str(tmp_path / "runs"), "run.id": "one"}))
    assert record.folder.stat().st_mode & 0o777 == 0o700
    record.finish("completed")
