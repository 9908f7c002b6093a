"""A module of a user's own, found by this process and by those that Flower starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from fedlora.config import Config, parse
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import flower
from tests.device import run_bound
from tests.federation import run_locally
from tests.simulations.engines.test_local import apart, saved_adapter


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> str:
    """Write a module into the folder, and make it importable as `name` until the test ends."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def assert_flower_gives_the_same(config: Config) -> None:
    """The same run on the local engine and on Flower's completes, with the same adapter."""
    folder, _ = run_locally(config)
    other = parse({"run.id": "on-flower"}, config)
    flower.run(other)
    assert json.loads((folder_of(other) / "result.json").read_text(encoding="utf-8"))["status"] == "completed"
    assert apart(saved_adapter(folder), saved_adapter(folder_of(other))) <= run_bound(1e-6)
