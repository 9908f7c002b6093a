"""A grid of runs: what is finished stays, what fails is recorded, and nothing that was started is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from fedlora.common.errors import ConfigError, RunError
from fedlora.simulations.comparison import compare
from fedlora.simulations.comparison.compare import Slot, slots_of
from fedlora.simulations.comparison.grid import Cell, Grid, load
from tests.deployment.programs import begun, called, make_site
from tests.federation import tiny
from tests.simulations.comparison.test_cell import SPLIT, grid_of

OWN = """
import os
from dataclasses import dataclass
from fedlora.strategies.methods.flora import Flora

@dataclass(frozen=True)
class Raises(Flora):
    def aggregate(self, state, updates, number):
        raise ZeroDivisionError("of the strategy's own")

@dataclass(frozen=True)
class Dies(Flora):
    def aggregate(self, state, updates, number):
        os._exit(3)
"""


class Here(ThreadPoolExecutor):
    """A slot's worker in this process."""

    _processes = None


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were run, each in no time: a result without a training, or a failure for `lr` above 1."""
    paths: list[str] = []

    def quick(cell: Cell, work: Path) -> dict[str, Any]:
        paths.append(cell.path)
        if cell.lr is not None and cell.lr > 1:
            raise RunError("round 1: training diverged")
        runs = [{"config": cell.keys(run)} for run in range(len(cell.configs))]
        scores = {name: {"accuracy": 0.5, "examples": 4, "clients": {}} for name in ("validation", "test")}
        facts = {"schema": 1, "status": "completed", "config": cell.keys(), "seconds": 0.1}
        return {**facts, "runs": [] if cell.label == "base" else runs, "scores": scores}

    monkeypatch.setattr(compare, "_worker", lambda slot, folder: Here(1))
    monkeypatch.setattr(compare, "_cell", quick)
    return paths


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Callable[..., Grid]:
    """A grid on the tiny model; `keys` as of `tiny`, `head` as of the file."""

    def made(strategies: list[str], keys: dict[str, Any] | None = None, **head: Any) -> Grid:
        short = {"federation__rounds": 1, "train__steps": 1, "federation__clients": 2, **(keys or {})}
        config = tiny(tmp_path, tiny_llama, **short, **{key.replace(".", "__"): v for key, v in SPLIT.items()})
        return grid_of(tmp_path, config, strategies, **head)

    return made


@pytest.fixture
def heard() -> Iterator[None]:
    """A test run in the background would hand down that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_finished_cells_are_not_run_again_and_a_grid_may_grow(make, ran, tmp_path) -> None:
    folder = tmp_path / "out"
    standing = compare.run(make(["flora"], seeds=[0, 1]), folder, [Slot()])
    assert ran == ["default/flora/lr0.005-seed0", "default/flora/lr0.005-seed1"]
    assert (standing.remaining, sorted(standing.done)) == (0, ran)
    before = contents(folder / "cells")
    compare.run(make(["flora", "fedsa"], seeds=[0, 1]), folder, [Slot(), Slot()])
    assert sorted(ran[2:]) == ["default/fedsa/lr0.005-seed0", "default/fedsa/lr0.005-seed1"]
    after = contents(folder / "cells")
    assert {path: after[path] for path in before} == before
    assert json.loads((folder / "grid.json").read_text())["strategies"] == ["flora", "fedsa"]
    assert not (folder / "work").exists()
    data = json.loads((folder / "cells" / "default" / "flora" / "lr0.005-seed1.json").read_text())
    own = {"scenario": "default", "label": "flora", "role": "strategy", "lr": 0.005, "seed": 1, "schema": 1}
    assert own.items() <= data.items()


def test_a_failure_is_recorded_the_rest_goes_on_and_retry_runs_it_again(make, ran, tmp_path) -> None:
    grid, folder = make(["flora"], **{"learning-rates": [1e-3, 1e6, 0.5]}), tmp_path / "out"
    standing = compare.run(grid, folder, [Slot()])
    failed = "default/flora/lr1e+06-seed0"
    assert {path: cell["status"] for path, cell in standing.done.items()} == {
        "default/flora/lr0.001-seed0": "completed",
        "default/flora/lr0.5-seed0": "completed",
        failed: "failed",
    }
    data = json.loads((folder / "cells" / f"{failed}.json").read_text())
    assert (data["error"], data["runs"], data["config"]["train.lr"]) == ("round 1: training diverged", [], 1e6)
    assert len(ran) == 3
    compare.run(grid, folder, [Slot()])
    assert len(ran) == 3
    compare.run(grid, folder, [Slot()], retry=True)
    assert ran[3:] == [failed]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "damaged, JSONDecodeError: .*; remove this one file"),
        (lambda text: "[]", "damaged, TypeError: .*; remove this one file"),
        (lambda text: "{}", "damaged, KeyError: 'schema'; remove this one file"),
        (lambda text: text.replace('"status"', '"state"'), "damaged, KeyError: 'status'; remove this one file"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "written by another version .schema 9, this one"),
        (
            lambda text: text.replace('"train.steps": 1', '"train.steps": 9'),
            "this cell was run with train.steps = 9, but the grid now has 1; choose another --out",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named_and_nothing_changes(make, ran, tmp_path, change, says) -> None:
    grid, folder = make(["flora", "fedsa"]), tmp_path / "out"
    compare.run(make(["flora"]), folder, [Slot()])
    path = folder / "cells" / "default" / "flora" / "lr0.005-seed0.json"
    path.write_text(change(path.read_text()))
    before = contents(folder)
    with pytest.raises(RunError, match=says) as failure:
        compare.run(grid, folder, [Slot()])
    assert str(failure.value).startswith(f"{path}: ")
    assert contents(folder) == before
    assert len(ran) == 1


def test_a_key_that_is_younger_than_a_cell_counts_as_its_default(make, ran, tmp_path) -> None:
    folder = tmp_path / "out"
    compare.run(make(["flora"]), folder, [Slot()])
    path = folder / "cells" / "default" / "flora" / "lr0.005-seed0.json"
    data = json.loads(path.read_text())
    for keys in (data["config"], *(run["config"] for run in data["runs"])):
        del keys["train.prox-of"]
    path.write_text(json.dumps(data))
    compare.run(make(["flora"]), folder, [Slot()])
    assert len(ran) == 1
    with pytest.raises(RunError, match=r"run with train\.prox-of = 'factors', but the grid now has 'update'"):
        compare.run(make(["flora"], {"train__prox_of": "update"}), folder, [Slot()])


def test_another_rank_of_one_client_is_another_local_baseline(make, ran, tmp_path) -> None:
    folder = tmp_path / "out"
    compare.run(make(["flora"], {"lora__ranks": "4,2"}, baselines=["local"]), folder, [Slot()])
    (folder / "cells" / "default" / "flora" / "lr0.005-seed0.json").unlink()
    changed = make(["flora"], {"lora__ranks": "4,1"}, baselines=["local"])
    with pytest.raises(RunError, match=r"local/lr0\.005-seed0\.json: .* lora\.ranks = '2', but the grid now has '1'"):
        compare.run(changed, folder, [Slot()])


def test_one_process_at_a_folder(make, ran, tmp_path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="out: another process works on this comparison"):
        compare.run(make(["flora"]), folder, [Slot()])
    assert ran == []
    assert not (folder / "grid.json").exists()
    compare.run(make(["flora"]), folder, [Slot()])
    assert len(ran) == 1


def test_baselines_that_participation_does_not_touch_are_run_once(make, ran, tmp_path) -> None:
    text = "[scenarios.full]\n[scenarios.half]\nfederation.fraction = 0.5\n"
    make(["flora"], baselines=["local"])
    path = tmp_path / "grid.toml"
    path.write_text(path.read_text() + text)
    standing = compare.run(load(path, Path), tmp_path / "out", [Slot()])
    assert ran == ["full/flora/lr0.005-seed0", "full/local/lr0.005-seed0", "half/flora/lr0.005-seed0"]
    full, half = (standing.done[f"{name}/local/lr0.005-seed0"] for name in ("full", "half"))
    assert (full["scenario"], half["scenario"]) == ("full", "half")
    assert {**full, "scenario": ""} == {**half, "scenario": ""}
    assert (standing.remaining, len(standing.done)) == (0, 4)


def test_real_processes_may_fail_or_die_and_the_next_cell_runs(make, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_for_compare.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    make(["flora"])
    path = tmp_path / "grid.toml"
    own = [f'[variants.{name.lower()}]\nstrategy.name = "own_for_compare:{name}"\n' for name in ("Raises", "Dies")]
    text = path.read_text().replace('strategies = ["flora"]', 'strategies = ["raises", "dies", "flora"]')
    path.write_text(text + "".join(own))
    seen: set[int] = set()

    def show(standing: compare.Standing) -> None:
        family = psutil.Process().children(recursive=True)
        seen.update(child.pid for child in family if "spawn_main" in " ".join(child.cmdline()))

    standing = compare.run(load(path, Path), tmp_path / "out", [Slot("cpu")], show=show)
    done = {path.split("/")[1]: cell for path, cell in standing.done.items()}
    assert done["raises"]["status"] == done["dies"]["status"] == "failed"
    assert "ZeroDivisionError" in done["raises"]["error"] or "of the strategy's own" in done["raises"]["error"]
    assert done["dies"]["error"] == "the process that ran it died: out of memory, or killed"
    assert done["flora"]["status"] == "completed"
    assert done["flora"]["scores"]["test"]["examples"] > 0
    assert "ZeroDivisionError" in (tmp_path / "out" / "logs" / "0.txt").read_text()
    assert len(seen) >= 2
    assert not any(psutil.pid_exists(pid) for pid in seen)


@pytest.mark.parametrize(
    ("text", "devices"),
    [("1", [""]), ("3", [""] * 3), ("cuda:0,cuda:1", ["cuda:0", "cuda:1"]), (" cpu , cpu ", ["cpu", "cpu"])],
)
def test_slots_are_a_number_or_devices(text: str, devices: list[str]) -> None:
    slots = slots_of(text)
    assert [slot.device for slot in slots] == devices
    assert all(slot.threads == max(1, (os.cpu_count() or 1) // len(devices)) for slot in slots)


@pytest.mark.parametrize("text", ["0", "-1", "", ",", "2,2", "1.5", "cuda:0,1", "cuda:x"])
def test_other_slots_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--slots '.*': expected a number from 1, or devices"):
        slots_of(text)


def wait_for(pattern: str, folder: Path, process: Any, output: Path) -> Path:
    deadline = time.monotonic() + 240
    while not (found := sorted(folder.glob(pattern))):
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    return found[0]


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_and_goes_on(make, tmp_path) -> None:
    make(["flora"], {"federation__rounds": 30, "train__steps": 4}, seeds=[0, 1, 2])
    site, out = make_site(tmp_path), tmp_path / "out"
    command = "fedlora compare grid.toml --out out --slots 1"
    with begun(command, site, "cells are finished already") as (process, _, output):
        first = wait_for("cells/*/*/*.json", out, process, output)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("cells/*/*/*.json")}
    assert first in kept
    assert len(kept) < 3
    done = called(command, site)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{len(kept)} of 3 cells are finished already" in done.stdout
    assert len(list(out.glob("cells/*/*/*.json"))) == 3
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == what for path, what in kept.items())
    assert not (out / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished(make, tmp_path, heard, told) -> None:
    make(["flora"], {"federation__rounds": 500})
    site, out = make_site(tmp_path), tmp_path / "out"
    with begun("fedlora compare grid.toml --out out", site, "cells are finished already") as (process, _, output):
        wait_for("work/0/run/0/result.json", out, process, output)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(told)
        assert process.wait(timeout=60) == 128 + told, output.read_text()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    assert f"interrupted; finished cells are in {out}; the same command runs the others" in output.read_text()
    assert "Traceback" not in output.read_text()
