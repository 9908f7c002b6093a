"""A comparison or a run as one page, with its figures and tables as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlora.errors import RunError


def write(folder: Path, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the report of a folder of `fedlora compare` or of one `fedlora run`.

    The page, report.html, needs nothing but itself; beside it lie figures/ (each as PNG, SVG and CSV) and, of a
    comparison, tables/ (final.md, final.tex and final.csv). Nothing else in the folder changes.

    Args:
        folder: with grid.json and cells/, or with result.json.
        out: where to; `folder`/report by default.
        say: told what is being done, for progress.

    Returns:
        The path of report.html.

    Raises:
        RunError: the folder is neither, its grid.json or result.json cannot be read, or the report cannot be written.
    """
    from . import compared, page, read, single

    folder = folder.expanduser().resolve()
    out = folder / "report" if out is None else out.expanduser().resolve()
    try:
        if (folder / "grid.json").is_file():
            found = read.comparison(folder)
            say(f"{len(found.cells)} cells read")
            made = compared.page(found, folder.name, say)
            compared.write_tables(found, made, out)
        elif (folder / "result.json").is_file():
            made = single.page(read.run(folder), folder)
        else:
            raise RunError(
                f"{folder}: neither grid.json nor result.json is here; give the folder of a fedlora compare or of a "
                "fedlora run"
            )
        path = page.write(made, out)
    except OSError as error:
        raise RunError(f"{out}: the report cannot be written: {error}; give another folder") from None
    say(f"written: {path}")
    return path
