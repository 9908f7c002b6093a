"""Finds the run that a user means by its name, its folder, or the folder of its adapter."""

from __future__ import annotations

from pathlib import Path

from fedlora.common.errors import AdapterError, RunError, suggest

_RECORD = "result.json"


def run_folder(named: Path | str) -> Path:
    """The folder of a run.

    Args:
        named: runs/<name>/<time>; runs/<name> for the latest run of that name; <name> or <name>/<time>, for the same in
            runs/; or the path of the adapter or of result.json in a run's folder.

    Raises:
        RunError: there is no such run.
    """
    given = Path(named).expanduser()
    for path in (given, Path("runs") / given):
        if found := _in(path.resolve()):
            return found
    known = sorted({record.parent.parent.name for record in Path("runs").glob(f"*/*/{_RECORD}")})
    raise RunError(
        f"{given}: no run here, {_RECORD} is missing; give the name of a run, its folder runs/<name>/<time>, or its "
        f"adapter's{suggest(str(given), known) if known else ''}"
    )


def adapter_folder(named: Path | str) -> Path:
    """The folder of a PEFT checkpoint, given as this folder itself, or as a run (see `run_folder`).

    Raises:
        AdapterError: there is no such checkpoint or run, or the run has no adapter yet.
    """
    given = Path(named).expanduser()
    if _holds_adapter(given):
        return given.resolve()
    try:
        run = run_folder(given)
    except RunError:
        raise AdapterError(
            f"{given}: no adapter here, adapter_config.json is missing; give a run's name, its folder "
            "runs/<name>/<time>, or the folder of a PEFT checkpoint"
        ) from None
    if not _holds_adapter(run / "adapter"):
        raise AdapterError(f"{run}: no adapter here yet; it is written after the first round")
    return run / "adapter"


def _holds_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _in(path: Path) -> Path | None:
    """The folder of the run to which this path belongs, or of the latest run in this folder; None if there is none."""
    for own in (path, path.parent):
        if (own / _RECORD).is_file() and (own == path or path.name in ("adapter", _RECORD)):
            return own
    found = sorted(path.glob(f"*/{_RECORD}"), key=lambda record: record.stat().st_mtime)
    return found[-1].parent if found else None
