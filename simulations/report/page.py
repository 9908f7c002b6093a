"""The report's page: one file that needs no other files, no scripts and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from fedlora import __version__

from .figures import drawing
from .figures.drawing import Picture
from .tables import Table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: heading of the section.
        tables: the tables, which are shown first.
        pictures: the pictures, which are shown after the tables.
        absent: sentences about what is not shown, and why.
    """

    title: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    absent: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """The contents of the page."""

    title: str
    summary: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]
    settings: Sequence[Table]


def write(page: Page, out: Path) -> Path:
    """Write report.html and figures/ into a folder, and return the page's path."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        picture.name: Markup(_labelled(drawing.write(picture, folder), picture))
        for section in page.sections
        for picture in section.pictures
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    path = out / "report.html"
    path.write_text(template.render(page=page, svg=drawn, version=__version__), encoding="utf-8")
    return path


def _labelled(svg: str, picture: Picture) -> str:
    """The SVG element with a description for readers who cannot see it, and without a fixed size."""
    words = escape(f"{picture.title}. {picture.reading}")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
