"""Who may import whom: simulations -> {strategies, clients} -> fedlora, and nothing sideways."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("strategies", "clients", "simulations", "configs")
MAY_IMPORT = {
    "fedlora": set(),
    "strategies": {"fedlora", "strategies"},
    "clients": {"fedlora", "clients"},
    "simulations": {"fedlora", "strategies", "clients", "simulations"},
    "configs": set(),
}
HEAVY = {"peft", "transformers", "bitsandbytes", "flwr", "datasets"}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ["fedlora", *parts[:-1]] if parts[0] in SIDES else list(parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def side_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "fedlora" and len(parts) > 1 and parts[1] in SIDES else parts[0]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_folder_imports_what_lies_beside_or_above_it(folder):
    for path in files(folder):
        if path.parent == ROOT / "fedlora" / "cli":  # commands, which hand over to the sides
            continue
        sides = {side_of(name) for name in imports(path)} & {*SIDES}
        assert sides <= MAY_IMPORT[folder], f"{path} imports {sides - MAY_IMPORT[folder]}"


def test_the_check_sees_relative_and_absolute_imports():
    assert "fedlora.strategies.server_app" in imports(ROOT / "simulations" / "engines" / "local.py")
    assert side_of("fedlora.strategies.schedules.synchronous") == "strategies"


@pytest.mark.parametrize("path", files("strategies/methods"), ids=lambda p: p.stem)
def test_a_method_file_needs_only_torch_and_the_core(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & HEAVY
    core = {name for name in imports(path) if name.startswith("fedlora.") and side_of(name) == "fedlora"}
    allowed = ("fedlora.adapters", "fedlora.exchange", "fedlora.common.errors")
    assert all(name.startswith(allowed) for name in core), core


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
