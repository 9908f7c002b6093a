"""Writes a report on a comparison or a run: one page, with its figures and tables also as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlora.common.errors import RunError
from fedlora.results.runs import run_folder


def write(
    folder: Path, out: Path | None = None, say: Callable[[str], None] = lambda text: None, samples: int = 8
) -> Path:
    """Write the report of a folder of `fedlora compare` or of one `fedlora run`.

    The page, report.html, needs no other files. Beside it are figures/ (each figure as PNG, SVG and CSV) and, for a
    comparison, tables/ (final.md, final.tex and final.csv). Nothing else in the folder changes.

    Args:
        folder: folder with grid.json and cells/, or a run (see `run_folder`).
        out: folder for the report; `folder`/report by default.
        say: called with a line of text about each step.
        samples: of a simulation on images, largest number of images of each client on the page.

    Returns:
        The path of report.html.

    Raises:
        RunError: the folder is neither, its grid.json or result.json cannot be read, or the report cannot be written.
    """
    from . import compared, page, read, single
    from . import samples as drawn

    folder = folder.expanduser().resolve() if (has_grid := _holds_comparison(folder)) else run_folder(folder)
    out = folder / "report" if out is None else out.expanduser().resolve()
    try:
        if has_grid:
            found = read.comparison(folder)
            say(f"{len(found.cells)} cells read")
            made = compared.page(found, folder.name, say)
            compared.write_tables(found, made, out)
        else:
            made = single.page(read.run(folder), folder, samples)
            drawn.forget(out)
        path = page.write(made, out)
    except OSError as error:
        raise RunError(f"{out}: the report cannot be written: {error}; give another folder") from None
    say(f"written: {path}")
    return path


def _holds_comparison(folder: Path) -> bool:
    return (folder.expanduser() / "grid.json").is_file()
