"""Runs the cells of a grid, several at a time. Finished cells are kept, and failed ones do not stop the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedlora.common.errors import ConfigError, FedLoraError, RunError
from fedlora.common.files import write_json
from fedlora.common.processes import end_with, share_cores, share_of_cores, stop
from fedlora.config import Config, parse

from . import race
from .grid import SCHEMA, Cell, Grid

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Slot:
    """A process that runs one cell at a time.

    Args:
        device: name of its device, as for `model.device`; "": that of each cell's config.
        threads: number of torch's threads.
    """

    device: str = ""
    threads: int = 1


@dataclass
class Standing:
    """The progress of a comparison.

    Attributes:
        grid: the comparison.
        slots: the processes that run its cells.
        done: path of a cell with a result -> content of its JSON file.
        running: number of a slot -> (its cell, the time at which the cell began, folder of the cell's runs).
        taken: seconds that each cell took that was run since the start.
        remaining: number of cells that are still to be run; at most, if the grid is a race.
        dropped: (scenario, label) of the strategies that dropped out of the race -> the seed after which they did.
    """

    grid: Grid
    slots: Sequence[Slot]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: dict[int, tuple[Cell, float, Path]] = field(default_factory=dict)
    taken: list[float] = field(default_factory=list)
    remaining: int = 0
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of cells when all is done; at most, if the grid is a race."""
        return len(self.done) + self.remaining

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the mean time of the cells so far; None before the first."""
        return sum(self.taken) / len(self.taken) * self.remaining / len(self.slots) if self.taken else None


def slots_of(text: str) -> list[Slot]:
    """The slots that `--slots` names: a number of cells at a time, or a device for each, such as "cuda:0,cuda:1".

    Raises:
        ConfigError: the text is neither.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) == 1 and names[0].isdigit() and int(names[0]):
        devices = [""] * int(names[0])
    elif names and all(re.fullmatch(r"[a-z]+(:\d+)?", name) for name in names):
        devices = names
    else:
        raise ConfigError(f"--slots {text!r}: expected a number from 1, or devices such as cuda:0,cuda:1 or cpu,cpu")
    threads = share_of_cores(len(devices))
    return [Slot(device, threads) for device in devices]


def run(
    grid: Grid,
    folder: Path,
    slots: Sequence[Slot],
    *,
    retry: bool = False,
    show: Callable[[Standing], None] = lambda standing: None,
) -> Standing:
    """Run every cell that has no result yet.

    Args:
        grid: the comparison; its cells are run in their order.
        folder: the comparison's folder; made if it is missing.
        slots: the processes that run cells; each keeps the base model from cell to cell.
        retry: whether failed cells are run again.
        show: called with the progress about once a second.

    Raises:
        RunError: another process uses this folder, or it has another comparison's cells or a damaged file.
    """
    share_cores(len(slots))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another process works on this comparison; wait for it, or stop it") from None
    try:
        standing = Standing(grid, slots, done=finished(grid, folder))
        if retry:
            standing.done = {path: data for path, data in standing.done.items() if data["status"] != "failed"}
        waiting = _look_ahead(standing)
        _keep_grid(standing, folder)
        _run_rest(standing, waiting, folder, show)
        _keep_grid(standing, folder)
        shutil.rmtree(folder / "work", ignore_errors=True)
        return standing
    finally:
        lock.release()


def finished(grid: Grid, folder: Path) -> dict[str, dict[str, Any]]:
    """The results in this folder of the grid's cells, by the cell's path.

    Raises:
        RunError: a file cannot be read or is of another version, or its cell was run with another config.
    """
    files = {cell: folder / "cells" / f"{cell.path}.json" for cell in grid.cells}
    return {cell.path: _read(cell, path) for cell, path in files.items() if path.is_file()}


def _read(cell: Cell, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
        if schema != SCHEMA:
            raise RunError(
                f"{path}: written by another version (schema {schema}, this one reads {SCHEMA}); choose another --out"
            )
        if missing := {"scenario", "label", "role", "lr", "seed", "status", "seconds"} - data.keys():
            raise KeyError(missing.pop())
        flats = [data["config"], *(run["config"] for run in data["runs"][1:])]
        asked = [cell.keys(run) for run in range(len(cell.configs))]
        # a key that is younger than the cell had its default, which changes nothing
        first = Config().to_flat()
        pairs = [
            (key, was.get(key, first[key]), now[key]) for was, now in zip(flats, asked, strict=False) for key in now
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: damaged, {type(error).__name__}: {error}; remove this one file, and its cell is run again"
        ) from None
    for key, was, now in pairs:
        if was != now:
            raise RunError(
                f"{path}: this cell was run with {key} = {was!r}, but the grid now has {now!r}; choose another --out, "
                "or change the grid back"
            )
    return data


def _keep_grid(standing: Standing, folder: Path) -> None:
    """Write grid.json, with the number of cells that the comparison has when all is done, as far as it is known."""
    write_json(folder / "grid.json", {"schema": SCHEMA, **standing.grid.facts(), "cells": standing.total})


def _look_ahead(standing: Standing) -> list[list[Cell]]:
    """The cells that may run now, in groups that are run once; sets how many remain."""
    ahead = race.plan(standing.grid, standing.done)
    standing.remaining, standing.dropped = len(ahead.due) + ahead.later, ahead.dropped
    return _shared(ahead.due)


def _run_rest(standing: Standing, waiting: list[list[Cell]], folder: Path, show: Callable[[Standing], None]) -> None:
    workers: list[ProcessPoolExecutor | None] = [None] * len(standing.slots)
    running: dict[Future[dict[str, Any]], tuple[int, list[Cell]]] = {}
    try:
        while waiting or running:
            for number, slot in enumerate(standing.slots):
                if number not in standing.running and waiting:
                    cells = waiting.pop(0)
                    work = folder / "work" / str(number)
                    future = _submitted(workers, number, folder, _placed(cells[0], slot), work)
                    running[future] = (number, cells)
                    standing.running[number] = (cells[0], time.monotonic(), work)
            show(standing)
            ended, _ = wait(running, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                number, cells = running.pop(future)
                result = _result(future, cells[0], time.monotonic() - standing.running.pop(number)[1])
                if isinstance(future.exception(), BrokenProcessPool):
                    workers[number] = None
                for cell in cells:
                    standing.done[cell.path] = _kept(folder, cell, result)
                standing.taken.append(result["seconds"])
            if ended:
                under_way = {cell.path for _, cells in running.values() for cell in cells}
                waiting = [cells for cells in _look_ahead(standing) if cells[0].path not in under_way]
        show(standing)
    finally:
        for worker in filter(None, workers):
            _stop(worker)


def _shared(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Groups of cells that compute the same, such as a baseline in scenarios that differ only in participation.

    Each group is run once.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        same = (cell.configs, cell.label) if cell.role == "baseline" else (cell.path,)
        groups.setdefault(same, []).append(cell)
    return list(groups.values())


def _placed(cell: Cell, slot: Slot) -> Cell:
    keys = {"run.threads": slot.threads} | ({"model.device": slot.device} if slot.device else {})
    return replace(cell, configs=tuple(parse(keys, config) for config in cell.configs))


def _kept(folder: Path, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """Write a cell's file; return its content."""
    about = {"scenario": cell.scenario, "label": cell.label, "role": cell.role, "lr": cell.lr}
    data = {"schema": SCHEMA, **about, "seed": cell.configs[0].run.seed, **result}
    path = folder / "cells" / f"{cell.path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data)
    return data


def _result(future: Future[dict[str, Any]], cell: Cell, seconds: float) -> dict[str, Any]:
    """The worker's result of a cell, or a result with the reason why the cell failed."""
    try:
        return future.result()
    except BrokenProcessPool:
        error = "the process that ran it died: out of memory, or killed"
    except FedLoraError as failure:
        error = str(failure)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {"status": "failed", "error": error, "config": cell.keys(), "runs": [], "seconds": round(seconds, 3)}


def _submitted(
    workers: list[ProcessPoolExecutor | None], slot: int, folder: Path, cell: Cell, work: Path
) -> Future[dict[str, Any]]:
    """Give a cell to the slot's process; start a new process if there is none, or if it died between two cells."""
    worker = workers[slot] = workers[slot] or _worker(slot, folder)
    try:
        return worker.submit(_cell, cell, work)
    except BrokenProcessPool:
        worker = workers[slot] = _worker(slot, folder)
        return worker.submit(_cell, cell, work)


def _worker(slot: int, folder: Path) -> ProcessPoolExecutor:
    given = (os.getpid(), folder / "logs" / f"{slot}.txt")
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=given)


def _begin(parent: int, log: Path) -> None:
    """Called in a worker before its first cell: print to a file, ignore Ctrl-C, and end with the parent."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Called in a worker: run one cell."""
    import torch

    from . import cell as cells

    torch.set_num_threads(cell.configs[0].run.threads or 1)
    try:
        return cells.run(cell, work)
    except Exception:
        traceback.print_exc()  # into the slot's log; the cell's file has only the message
        raise


def _stop(worker: ProcessPoolExecutor) -> None:
    """Stop a worker at once; its cell will be run again from the start.

    The executor's own thread is waited for: it closes pipes that the interpreter, as it ends, would write to.
    """
    for process in list((worker._processes or {}).values()):  # there is no public name for these
        if process.pid:
            stop(process.pid)
    worker.shutdown(cancel_futures=True)
