"""The run record: result.json, TensorBoard events and the adapter, valid after every round."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fedlora import __version__
from fedlora.adapters import AdapterState
from fedlora.common.errors import ConfigError, RunError
from fedlora.common.files import write_json
from fedlora.config import Config, Scalar, parse, parse_overrides
from fedlora.exchange import ClientInfo

from . import journal
from .runs import run_folder

SCHEMA = 1
# What a run that is resumed may have changed: everything else decides what it computes, or what it measures.
_MAY_CHANGE = frozenset(
    {
        "federation.rounds",
        "federation.min-clients",
        "federation.round-timeout",
        "federation.wait-timeout",
        "federation.max-rank",
        "federation.max-hosted",
        "run.keep",
        "run.threads",
        "model.device",
        "model.gradient-checkpointing",
        "evaluate.every",
        "evaluate.intruders",
        "evaluate.batch-size",
    }
)
_WHERE = frozenset({"run.dir", "run.name", "run.id", "run.resume", "run.from-round", "run.by"})
_PATHS = frozenset({"model.name", "data.source"})
_HOLDER = ".pid"  # beside the lock: of the process that has it, and its machine
_log = logging.getLogger("fedlora")
_PACKAGES = ("torch", "flwr", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


class RunRecord:
    """One run's folder, `<run.dir>/<run.name>/<run.id or time>/`, and what is written there.

    Attributes:
        folder: this run's own; no other process writes there until `finish`.
        key: of this run, the same whenever it is resumed.
        data: what result.json holds.
    """

    def __init__(self, config: Config) -> None:
        """Begin a record, or open the one of `run.id` again where `run.resume` is set.

        Raises:
            RunError: the folder exists already or cannot be made; or there is nothing to resume in it, or another
                process is at it.
            ConfigError: the run to resume was of another config.
        """
        self._config = config
        self.folder = folder_of(config)
        self._resumes = config.run.resume
        self._replayed: int | None = None
        self._events: Any = None
        self._told = False
        if self._resumes:
            found = stored(self.folder)
            check_changes(found, config)
        else:
            found = {}
            self._make_folder()
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(_taken(self.folder)) from None
        with suppress(OSError):
            (self.folder / _HOLDER).write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
        self._began = time.perf_counter() - found.get("seconds", 0.0)
        self._peak: Mapping[str, int] = found.get("peak-memory-bytes", {})
        self.data: dict[str, Any] = found or self._fresh(config)
        whole = config.to_flat() | {"run.resume": False, "run.from-round": -1}
        self.data |= {"status": "running", "config": whole}
        self.data.pop("error", None)
        self.key: str = self.data["key"]
        self._write()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, mode=0o700)  # an adapter can tell rows
        except FileExistsError:
            raise RunError(
                f"{self.folder} exists already; choose another run.name or run.id, or go on with that run: "
                f"fedlora run --resume {self.folder}"
            ) from None
        except OSError as error:
            raise RunError(f"run.dir: cannot write to {self.folder}: {error}; choose another run.dir") from None

    @staticmethod
    def _fresh(config: Config) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "status": "running",
            "key": secrets.token_hex(8),
            "started": _now(),
            "config": {},
            "versions": versions(),
            "code": code_version(),
            "device": device_facts(config),
            "rounds": [],
        }

    def go_on(self, done: int | None) -> None:
        """Of a run that is resumed, drop what was recorded of rounds after `done`, which are played again.

        Args:
            done: the last round that the server's checkpoint knows; None without a checkpoint.

        Raises:
            RunError: rounds were complete, but their checkpoint is gone.
        """
        if not self._resumes:
            return
        rounds = self.data["rounds"]
        if done is None and len(rounds) > 1:  # a round is recorded, then its checkpoint: it may lack for the first only
            raise RunError(
                f"{self.folder}: {len(rounds)} rounds are recorded, and there is no checkpoint in "
                f"{self.folder / 'state'}; this run cannot be resumed, start a new one"
            )
        self.data["rounds"] = [entry for entry in rounds if done is not None and entry["round"] <= done]
        self._replayed = 0 if done is None else done + 1
        facts = {"versions": versions(), "code": code_version(), "device": device_facts(self._config)}
        changed = {name: value for name, value in facts.items() if value != self.data.get(name)}
        self.data.setdefault("resumed", []).append({"time": _now(), "after-round": done, **changed})
        self._write()
        if self.data["rounds"] or "baseline" in self.data:
            self._tell()
        _log.info("resumed after %s", "nothing: no round was complete" if done is None else f"round {done}")

    def start(
        self,
        clients: Sequence[ClientInfo],
        fingerprint: str,
        facts: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Who takes part, on which base.

        Args:
            clients: all that are known.
            fingerprint: of the base.
            facts: what else is to be said of the base, by names.
            classes: what they are called, in the order of their numbers; nothing where they have numbers alone.

        Raises:
            RunError: the run to resume was on another base.
        """
        if self.data.get("base", fingerprint) != fingerprint:
            raise RunError(
                f"{self.folder}: its rounds were on base model {self.data['base']!r}, model.name = "
                f"{self._config.model.name} is now {fingerprint!r}; put the earlier model back, or start a new run"
            )
        self.data["base"] = fingerprint
        for what, words in (facts or {}).items():
            self.data[what] = words
            _log.info("%s: %s", what, words)
        if classes:
            self.data["classes"] = list(classes)
        self.data["clients"] = [_about(client) for client in clients]
        self._write()

    def joined(self, client: ClientInfo, round: int) -> None:
        """A client that came, or came back on another node, after the run had begun."""
        others = [about for about in self.data["clients"] if about["client-id"] != client.client_id]
        others.append(_about(client) | {"joined-in-round": round})
        self.data["clients"] = sorted(others, key=lambda about: about["client-id"])
        self._write()

    def _tell(self) -> None:
        """Where the results are, once there are some."""
        if not self._told:
            self._told = True
            _log.info("results: %s", self.folder)

    def baseline(self, metrics: Mapping[str, float]) -> None:
        """Held-out metrics before round 1."""
        self.data["baseline"] = dict(metrics)
        self._scalars("heldout", metrics, 0)
        self._write()
        self._tell()

    def round(self, entry: Mapping[str, Any]) -> None:
        """A complete round."""
        self.data["rounds"].append(dict(entry))
        number = entry["round"]
        self._scalars("heldout", entry.get("heldout", {}), number)
        self._scalars("client-test", entry.get("client-test", {}).get("mean", {}), number)
        self._scalars("seconds", entry["seconds"], number)
        single = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "round"}
        self._scalars("round", single, number)
        self._write()
        self._tell()

    @property
    def excluded(self) -> frozenset[int]:
        """Clients that the run goes on without."""
        return frozenset(int(client) for client in self.data.get("excluded", {}))

    def exclude(self, client: int, reason: str, undone: int | None) -> None:
        """Note that the run goes on without a client, and which round's result was dropped, if any was."""
        self.data.setdefault("excluded", {})[str(client)] = reason
        for entry in self.data["rounds"]:
            if entry["round"] == undone:
                entry["taken-back"] = reason
        self._write()

    def save_adapter(self, adapter: AdapterState) -> None:
        """The PEFT checkpoint of everything learned so far.

        Raises:
            RunError: it cannot be written.
        """
        from safetensors import SafetensorError

        from fedlora.models.adapted import save_checkpoint

        about = {"config": self.data["config"], "base": self.data.get("base")}
        if "classes" in self.data:
            about["classes"] = self.data["classes"]
        folder = self.folder / "adapter"
        try:
            save_checkpoint(adapter, folder, self._config.model, about)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder}: the adapter cannot be written: {error}") from error

    def finish(self, status: str, error: str | None = None) -> None:
        """The last word: completed, interrupted or failed. After an error the disk may not take it."""
        self.data["status"] = status
        if error:
            self.data["error"] = error
        try:
            if self._events:
                self._events.close()
            self._write()
        except (OSError, RunError) as last:
            if status == "completed":
                raise
            _log.warning("%s", last)
        finally:
            self._lock.release()

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._replayed)
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", value, step)

    def _write(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self._began, 3)
        peak = peak_memory_bytes()
        self.data["peak-memory-bytes"] = {name: max(size, self._peak.get(name, 0)) for name, size in peak.items()}
        path = self.folder / "result.json"
        try:
            write_json(path, self.data)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error}") from error


def _about(client: ClientInfo) -> dict[str, Any]:
    return {
        "client-id": client.client_id,
        "rank": client.rank,
        "alpha": client.alpha,
        "num-examples": client.num_examples,
    }


def stamp(config: Config) -> Config:
    """The config with the time as `run.id`, where it has none."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return config if config.run.id else replace(config, run=replace(config.run, id=now))


def folder_of(config: Config) -> Path:
    """Where a run's results go."""
    run = stamp(config).run
    return Path(run.dir).expanduser().resolve() / run.name / run.id


@contextmanager
def nothing_left(config: Config) -> Iterator[None]:
    """A run's folder that is made within the block goes again when the block fails before anything was run."""
    folder = folder_of(config)
    new = [path for path in (folder, folder.parent, folder.parent.parent) if not path.exists()]
    try:
        yield
    except BaseException:
        if folder in new and not _holds_results(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for empty in new[1:]:
                with suppress(OSError):  # another run is there
                    empty.rmdir()
        raise


def _holds_results(folder: Path) -> bool:
    """Whether a round has begun, or the base was evaluated."""
    try:
        data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    begun = any(event["event"] == "round-start" for event in journal.read(folder / journal.NAME))
    return begun or bool(data.get("rounds")) or "baseline" in data


def is_taken(folder: Path) -> bool:
    """Whether a process is at the run in this folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no such folder, or not ours to lock
        return False


def _taken(folder: Path) -> str:
    """Which process is at the run in this folder, and what to do about it."""
    try:
        pid, _, machine = (folder / _HOLDER).read_text(encoding="utf-8").partition(" ")
    except OSError:
        pid, machine = "", ""
    where = f"process {pid} on {machine}" if pid.isdigit() else "another process"
    how = f" (kill {pid})" if pid.isdigit() else ""
    return f"{folder}: {where} is still at this run; wait for it, or stop it{how}"


def resumed(folder: Path, overrides: Sequence[str] = (), from_round: int = -1) -> Config:
    """The config that goes on with the run in this folder: its own, with `key=value` overrides.

    Args:
        folder: the run's.
        overrides: what is changed.
        from_round: to go back to what the server had after this round; -1 goes on from the last.

    Raises:
        RunError: there is no run in this folder, it is complete, or a process is still at it.
        ConfigError: an override is wrong, or would change what the run computes.
    """
    folder = run_folder(folder)
    data = stored(folder)
    if is_taken(folder):
        raise RunError(_taken(folder))
    config = parse(parse_overrides(overrides), parse(data["config"], where=str(folder / "result.json")), where="-c")
    here = replace(config.run, dir=str(folder.parent.parent), name=folder.parent.name, id=folder.name, resume=True)
    config = replace(config, run=replace(here, from_round=from_round))
    check_changes(data, config)
    return config


def stored(folder: Path) -> dict[str, Any]:
    """The result.json of a run.

    Raises:
        RunError: there is none, or it is no run's.
    """
    path = folder / "result.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: no run here, result.json is missing; give a folder runs/<name>/<time>") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not _is_record(data):
        raise RunError(f"{path}: not the record of a run that this version can read; start a new run")
    return data


def _is_record(data: Any) -> bool:
    """Whether this has what a record of this version always has."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return False
    kinds = {"key": str, "status": str, "config": dict, "rounds": list}
    if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        return False
    parts = {"round": int, "clients": dict, "failures": dict, "seconds": dict}
    return isinstance(data["config"].get("federation.rounds"), int) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in parts.items())
        for entry in data["rounds"]
    )


def ended_by(folder: Path, error: Exception) -> bool:
    """Whether the run in this folder ended with this error, which engines in other processes tell within their own."""
    try:
        said = stored(folder).get("error")
    except RunError:
        return False
    return bool(said) and said in str(error)


def check_changes(data: Mapping[str, Any], config: Config) -> None:
    """Whether this config may go on with a recorded run.

    Raises:
        RunError: the run is complete.
        ConfigError: a key differs that decides what the run computes.
    """
    before, now = data["config"], config.to_flat()
    rounds = before.get("federation.rounds", 0)
    if config.federation.rounds < rounds:
        raise ConfigError(
            f"federation.rounds = {config.federation.rounds}: a run that is resumed may have more rounds than its "
            f"{rounds}, not fewer"
        )
    goes_back = 0 <= config.run.from_round < rounds
    if data["status"] == "completed" and config.federation.rounds == rounds and not goes_back:
        raise RunError(
            f"{folder_of(config)}: all {rounds} rounds are complete; for more of them set a larger federation.rounds, "
            "to go back give --from-round"
        )
    for key in sorted(now.keys() - _MAY_CHANGE - _WHERE):
        if key in before and not _same(key, before[key], now[key]):
            raise ConfigError(
                f"{key} = {now[key]!r}: the run to resume has {before[key]!r}, and would become another run; leave it, "
                "or start a new run"
            )


def _same(key: str, before: Scalar, now: Scalar) -> bool:
    """Whether two values are one; Flower's engine makes paths absolute."""
    if key not in _PATHS or before == now:
        return before == now
    short, long = sorted((Path(str(before)).parts, Path(str(now)).parts), key=len)
    return bool(short) and long[-len(short) :] == short


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of this product, Python, and the libraries that decide results."""
    found = {"fedlora": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code_version() -> dict[str, Any]:
    """Commit and a dirty flag when this is a checkout; nothing for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)} if commit else {}


def device_facts(config: Config) -> dict[str, Any]:
    """What it ran on."""
    import torch

    from fedlora.models import pick_device

    facts: dict[str, Any] = {
        "device": str(pick_device("auto")) if config.model.device == "auto" else config.model.device,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory-bytes": psutil.virtual_memory().total,
        "torch-threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def peak_memory_bytes() -> dict[str, int]:
    """Largest resident memory of this process so far, and of its GPU allocations."""
    import torch

    peak: dict[str, int] = {"process": _peak_rss()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
