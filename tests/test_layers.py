"""Who may import whom: the contracts of pyproject.toml, over the layout of the wheel; and that the wheel is whole."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("strategies", "clients", "simulations", "configs")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over a copy in which the sides lie inside the package, as in the wheel."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def as_in_the_wheel(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedlora", tmp_path / "fedlora", ignore=ignored)
    for side in SIDES:
        shutil.copytree(ROOT / side, tmp_path / "fedlora" / side, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_contracts_are_kept_and_would_be_seen_broken(as_in_the_wheel: Path) -> None:
    done = lint(as_in_the_wheel)
    assert done.returncode == 0, done.stdout
    assert "7 kept, 0 broken" in done.stdout
    with (as_in_the_wheel / "fedlora" / "strategies" / "methods" / "flora.py").open("a") as file:
        file.write("from fedlora.clients.training import trainer\n")
    done = lint(as_in_the_wheel)
    assert done.returncode == 1
    assert "fedlora.strategies is not allowed to import fedlora.clients" in done.stdout


@pytest.mark.parametrize("folder", SIDES)
def test_a_folder_refuses_its_bare_name(folder):
    source = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    with pytest.raises(ImportError, match=rf"fedlora\.{folder}"):
        exec(compile(source, folder, "exec"), {"__name__": folder})


def test_every_room_is_in_the_wheel():
    """setuptools finds no package under another name than its folder's: all are listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {path.parent.relative_to(ROOT) for top in ("fedlora", *SIDES) for path in (ROOT / top).rglob("__init__.py")}
    named = {("" if room.parts[0] == "fedlora" else "fedlora.") + ".".join(room.parts): str(room) for room in rooms}
    assert sorted(listed["packages"]) == sorted(named)
    assert listed["package-dir"] == {name: room for name, room in named.items() if not room.startswith("fedlora")}


def test_the_code_imports_no_library_of_the_tests_alone():
    """Users do not have what the extra dev installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    known = _names([project["name"], *project["dependencies"], *chain(*extras.values())])
    dev = _names(project["optional-dependencies"]["dev"]) - known
    owners = importlib.metadata.packages_distributions()
    found: set[tuple[str, str]] = set()
    for path in (path for top in ("fedlora", *SIDES) for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names}
            found |= {(str(path.relative_to(ROOT)), top) for top in tops if _names(owners.get(top, [])) & dev}
    assert not found
    assert "scikit-learn" in dev


def _names(needs: Iterable[str]) -> set[str]:
    return {re.split(r"[\[<>=~!; ]", need)[0].lower().replace("_", "-") for need in needs}
