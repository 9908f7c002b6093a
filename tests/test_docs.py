"""What the documentation shows does what it says, and its site is built."""

import doctest
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.config import describe
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


def code_under(page: str, heading: str) -> str:
    """The first block of Python below a heading of the second level."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


def test_the_task_of_your_own_runs_as_shown(tmp_path, tiny_bert, monkeypatch):
    code = code_under("extending.md", "A task")
    assert 15 <= len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "shown_task.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny(
        tmp_path,
        tiny_bert,
        lora__target_modules="query,value",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition="iid",
        model__task="shown_task:Smoothed",
        model__task_options="smoothing=0.2",
    )
    _, result = run_locally(config)
    assert 0.5 <= result["rounds"][-1]["heldout"]["confidence"] <= 1
