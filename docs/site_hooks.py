"""Hooks for the site of `make docs`: pages and tables besides the files in docs/."""

import re
import shutil
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fedlora.config import describe

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
SIDES = ("strategies", "clients", "simulations")
KEYS = "<!-- the site has a table of all keys here -->"


def on_startup(**_: object) -> None:
    """Copies the sources into one package, as a wheel has them: the reference is read from files, without the shim."""
    package = ROOT / "build" / "reference" / "fedlora"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fedlora", package)
    for side in SIDES:
        shutil.copytree(ROOT / side, package / side)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root. Their links to docs/ are changed, since all pages share a folder."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"(\]\(|src=\")docs/", r"\1", text)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fills in the table of keys, and turns a link to a page of the repository's root into one within the site."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown.replace(KEYS, keys()) if KEYS in markdown else markdown


def keys() -> str:
    """Every configuration key, its default and its meaning, as a table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, meaning in describe():
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        text = escape(meaning, quote=False).replace("|", "&#124;")
        rows.append(f"| `{key}` | {f'`{shown}`' if shown else ''} | {text} |")
    return "\n".join(rows)
