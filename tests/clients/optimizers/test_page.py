"""The table of optimizers in docs/optimizers.md is that of the registry."""

from __future__ import annotations

import re
from dataclasses import fields

from fedlora.clients.optimizers.registry import OPTIMIZERS
from fedlora.config import describe
from tests.test_docs import DOCS


def test_the_page_has_every_optimizer_with_its_options_passes_and_status():
    page = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    rows = {}
    for line in re.findall(r"^\| `.*\|$", page, flags=re.MULTILINE)[1:]:  # without the heading
        key, _, _, options, passes, _, status = (cell.strip() for cell in line[1:-1].split("|"))
        rows[key.strip("`")] = options, int(passes), status
    assert list(rows) == sorted(rows, key=[*OPTIMIZERS.names].index)
    assert rows.keys() == OPTIMIZERS.names.keys()
    for name, (options, passes, status) in rows.items():
        made = OPTIMIZERS.load(name)
        shown = dict(re.findall(r"`(\w+)` = ([\w.-]+)", options))
        expected = {field.name: field.default for field in fields(made)}
        assert OPTIMIZERS.parse(",".join(f"{key}={value}" for key, value in shown.items())) == expected
        assert passes == made.passes
        assert (status == "experimental") == bool(made.experimental)


def test_the_help_of_the_key_names_every_optimizer():
    (meaning,) = [meaning for key, _, meaning in describe() if key == "train.optimizer"]
    assert set(OPTIMIZERS.names) <= set(re.findall(r"[\w-]+", meaning))
