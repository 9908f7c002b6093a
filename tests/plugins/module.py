"""A module of a user's own, found by this process and by those that Flower starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> str:
    """Write a module into the folder, and make it importable as `name` until the test ends."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name
