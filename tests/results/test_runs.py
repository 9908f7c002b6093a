"""A run is found by all that a user may call it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedlora.common.errors import AdapterError, RunError
from fedlora.results.runs import adapter_folder, run_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs of one name, the first with an adapter, the second the later one."""
    for name, time in (("first", 100), ("second", 200)):
        folder = tmp_path / "runs" / "mine" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        os.utime(folder / "result.json", (time, time))
    (tmp_path / "runs" / "mine" / "first" / "adapter").mkdir()
    (tmp_path / "runs" / "mine" / "first" / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "named",
    [
        "runs/mine/first",
        "mine/first",
        "runs/mine/first/adapter",
        "mine/first/adapter",
        "runs/mine/first/result.json",
        "runs/mine/first/",
    ],
)
def test_a_run_is_its_folder_its_name_its_adapter_or_its_record(here: Path, named: str) -> None:
    assert run_folder(named) == here / "runs" / "mine" / "first"
    assert adapter_folder(named) == here / "runs" / "mine" / "first" / "adapter"


@pytest.mark.parametrize("named", ["mine", "runs/mine"])
def test_a_name_is_its_last_run(here: Path, named: str) -> None:
    assert run_folder(named) == here / "runs" / "mine" / "second"
    with pytest.raises(AdapterError, match=r"runs/mine/second: no adapter here yet"):
        adapter_folder(named)


def test_a_checkpoint_need_not_be_a_runs(here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "adapter_config.json").write_text("{}")
    assert adapter_folder("other") == here / "other"


def test_what_is_not_there_is_named_with_what_is_near(here: Path) -> None:
    with pytest.raises(RunError, match=r"^mien: no run here, .*; did you mean 'mine'\?$"):
        run_folder("mien")
    with pytest.raises(RunError, match=r"known are mine$"):
        run_folder("runs/mine/third")
    with pytest.raises(AdapterError, match=r"^mien: no adapter here, adapter_config.json is missing"):
        adapter_folder("mien")
