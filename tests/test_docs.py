"""What the documentation shows does what it says, and its site is built."""

import doctest
import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.clients.node.rules import check_plugins
from fedlora.common.errors import ConfigError
from fedlora.config import Scalar, describe, find_preset, load, parse, parse_overrides
from fedlora.strategies.configured import check_ranks
from tests.federation import run_locally, tiny, write_labels

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_the_strategy_of_your_own_runs_as_shown():
    done = doctest.testfile(str(DOCS / "strategies.md"), module_relative=False, encoding="utf-8")
    assert done.attempted >= 10
    assert done.failed == 0


def test_what_the_page_on_python_shows_is_what_python_says(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    page = str(DOCS / "python.md")
    done = doctest.testfile(page, module_relative=False, encoding="utf-8", globs={"tiny_model": str(tiny_llama)})
    assert done.attempted >= 20
    assert done.failed == 0


@pytest.mark.parametrize("page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.glob("**/*.md"))])
def test_a_page_links_to_the_terms_that_it_uses(page):
    if "/tables/" in page or page == "docs/concepts.md":  # made by `fedlora report`, or the page itself
        return
    assert re.search(r"\]\([\w./]*concepts\.md", (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md", "docs/architecture.md"])
def test_a_file_that_a_page_names_is_there(page):
    """Paths in backticks that begin with a folder of this repository."""
    folders = "fedlora|strategies|clients|simulations|configs|tests|benchmarks|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    shown = html.unescape((tmp_path / "reference" / "config.html").read_text(encoding="utf-8"))
    assert not [key for key, _, meaning in describe() if key not in shown or meaning not in shown]
    assert 'id="fedlora.strategies.base.Strategy.aggregate"' in (tmp_path / "reference" / "strategies.html").read_text(
        encoding="utf-8"
    )
    for page in tmp_path.rglob("*.html"):
        if page.name != "report.html":
            fetched = re.findall(
                r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*(?:stylesheet|preconnect)[^>]*//",
                page.read_text(encoding="utf-8"),
            )
            assert not fetched, page


def shown_under(page: str, heading: str, language: str) -> str:
    """The first block of a language below a heading of the second level."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split(f"```{language}\n")[1].split("```")[0]


def keys_of(command: str) -> dict[str, Scalar]:
    """What `-c KEY=VALUE` sets in a command."""
    words = shlex.split(command)
    return parse_overrides(words[i + 1] for i, word in enumerate(words) if word == "-c")


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Writes the module that a section of extending.md shows; the keys of the command below it."""

    def write(heading: str) -> dict[str, Scalar]:
        code, command = (shown_under("extending.md", heading, language) for language in ("python", "sh"))
        assert 12 <= len([line for line in code.splitlines() if line.strip()]) <= 40
        keys = keys_of(command)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
            monkeypatch.delitem(sys.modules, name)
        (module,) = {value.split(":")[0] for value in map(str, keys.values()) if value.startswith("mypkg.")}
        (tmp_path / "mypkg").mkdir()
        (tmp_path / "mypkg" / f"{module.partition('.')[2]}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        check_ranks(parse(keys, load(find_preset(shlex.split(command)[2]))))  # the preset in the command fits
        return keys

    return write


def test_the_task_of_your_own_runs_as_shown(tmp_path, tiny_bert, shown):
    config = tiny(
        tmp_path,
        tiny_bert,
        lora__target_modules="query,value",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition="iid",
    )
    _, result = run_locally(parse(shown("A task"), config))
    assert 0.5 <= result["rounds"][-1]["heldout"]["confidence"] <= 1


@pytest.mark.parametrize(
    ("heading", "without"),
    [
        ("A strategy", "strategy.options"),
        ("An initializer", "lora.init-options"),
        ("A client optimizer", "train.optimizer-options"),
        ("An adapter kind", "lora.kind-options"),
        ("A rule for ranks", "lora.allocation"),
        ("A layer rule", "strategy.options"),
        ("A privacy stage", "privacy.stages-options"),
    ],
)
def test_a_plug_in_of_your_own_runs_as_shown_and_its_option_counts(tmp_path, tiny_llama, shown, heading, without):
    base = tiny(tmp_path, tiny_llama, train__lr=2e-2, train__clients_at_once="auto")
    keys = shown(heading)
    _, result = run_locally(parse(keys, base))
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    plain = {key: value for key, value in keys.items() if key != without} | {"run.id": "two"}
    _, other = run_locally(parse(plain, base))
    assert other["rounds"][-1]["heldout"]["loss"] != result["rounds"][-1]["heldout"]["loss"]


def test_the_schedule_of_your_own_runs_as_shown(tmp_path, tiny_llama, shown):
    keys = shown("A schedule")
    config = tiny(tmp_path, tiny_llama)
    _, result = run_locally(parse(keys, config))
    assert [entry["round"] for entry in result["rounds"]] == [1]
    _, whole = run_locally(parse({**keys, "federation.schedule-options": "", "run.id": "two"}, config))
    assert len(whole["rounds"]) == config.federation.rounds


def test_the_plug_ins_that_nodes_have_to_allow_are_those_that_the_page_names():
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.* \| `([a-z.]+)` \| .* \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 8
    for key, importers in rows:
        config = parse({key: "mypkg.mine:Mine"})
        if "nodes" not in importers or "statistic" in importers:
            check_plugins(config, {})
            continue
        with pytest.raises(ConfigError, match=f"{key} = 'mypkg.mine:Mine' is not part of fedlora"):
            check_plugins(config, {})
        check_plugins(config, {"plugins": "mypkg.mine:Mine"})
    with pytest.raises(ConfigError, match=r"the statistic of round 0 = 'mypkg.mine:Mine' is not part of fedlora"):
        check_plugins(parse({}), {}, "mypkg.mine:Mine")
