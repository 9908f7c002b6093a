"""docs/literature.md lists what the registries have, and every key on the page is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlora.adapters.kinds.registry import KINDS
from fedlora.clients.optimizers.registry import OPTIMIZERS
from fedlora.config import parse
from fedlora.strategies.allocations.registry import ALLOCATIONS
from fedlora.strategies.configured import configured
from fedlora.strategies.initializers.registry import INITIALIZERS
from fedlora.strategies.registry import STRATEGIES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "literature.md").read_text(encoding="utf-8")
ROWS = [
    line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "turned on by" not in line
]
TURNED_ON = [dict(re.findall(r"`([a-z.-]+) = ([\w.-]+)`", row[1])) for row in ROWS]
COMMANDS = {command for row in ROWS for command in re.findall(r"`fedlora (\w+)`", row[1])}
# What everybody means by LoRA's own training, and what is no method of the literature on LoRA.
PLAIN = {"adamw", "sgd", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "pattern"}


@pytest.mark.parametrize(
    "registry", [STRATEGIES, INITIALIZERS, KINDS, OPTIMIZERS, ALLOCATIONS], ids=lambda registry: registry.key
)
def test_the_page_has_every_method(registry):
    listed = {keys[registry.key] for keys in TURNED_ON if registry.key in keys}
    assert listed - PLAIN == {*registry.names} - PLAIN


@pytest.mark.parametrize(
    ("row", "keys"),
    [*zip(ROWS, TURNED_ON, strict=True)],
    ids=[" ".join(keys.values()) or "command" for keys in TURNED_ON],
)
def test_what_turns_a_method_on_is_accepted(row, keys):
    assert keys or re.search(r"`fedlora \w+`", row[1])
    rounds = {key: int(value) if value.isdigit() else value for key, value in keys.items()}
    configured(parse({"strategy.name": "fedavg", "lora.ranks": "", **rounds}))


def test_a_command_on_the_page_is_there():
    from fedlora.cli import main  # noqa: F401 - its import registers the commands
    from fedlora.cli.shared import app

    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert COMMANDS
    assert known >= COMMANDS


def test_what_is_experimental_says_so():
    for row, keys in zip(ROWS, TURNED_ON, strict=True):
        for registry in (INITIALIZERS, KINDS, OPTIMIZERS, ALLOCATIONS, STRATEGIES):
            if registry.key in keys and not re.search(r"`fedlora \w+`", row[1]):
                method = registry.resolve(keys[registry.key])
                said = getattr(method, "experimental", "") or "Experimental" in (method.__doc__ or "")
                assert bool(said) is (row[-1].strip(" |") == "experimental"), keys


def test_exact_kinds_are_the_linear_ones():
    for row, keys in zip(ROWS, TURNED_ON, strict=True):
        if keys.get("lora.kind", "lora") != "lora":
            assert (row[2] in ("yes", "with equal ranks")) is KINDS.resolve(keys["lora.kind"]).linear


def test_every_row_is_whole_and_its_check_is_a_test():
    columns = ["method", "turned-on", "exact", "ranks", "download", "upload", "cost", "check", "status"]
    folder = Path(__file__).resolve().parent
    tests = {
        name
        for path in folder.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in ROWS:
        assert len(row) in (len(columns) - 1, len(columns)), row[0]  # an empty status is stripped
        assert all(cell.strip() for cell in row[:8]), row[0]
        checks = re.findall(r"`(test_\w+)`", row[columns.index("check")])
        assert checks, row[0]
        assert tests >= {*checks}, row[0]


def test_strategies_say_on_the_page_what_they_say_of_unequal_ranks():
    for row, keys in zip(ROWS, TURNED_ON, strict=True):
        if "strategy.name" in keys:
            assert (row[3] == "yes") is STRATEGIES.resolve(keys["strategy.name"]).unequal_ranks, keys
