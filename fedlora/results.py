"""The run record: result.json, TensorBoard events and the adapter, valid after every round."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fedlora import __version__
from fedlora.adapter import AdapterState
from fedlora.config import Config
from fedlora.errors import RunError
from fedlora.exchange import ClientInfo

SCHEMA = 1
_PACKAGES = ("torch", "flwr", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


class RunRecord:
    """One run's folder, `<run.dir>/<run.name>/<run.id or time>/`, and what is written there."""

    def __init__(self, config: Config) -> None:
        """Raises RunError when the folder exists already or cannot be made."""
        self._config = config
        self.folder = folder_of(config)
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{self.folder} exists already; choose another run.name or run.id") from None
        except OSError as error:
            raise RunError(f"run.dir: cannot write to {self.folder}: {error}; choose another run.dir") from None
        self._began = time.perf_counter()
        self._events: Any = None
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config.to_flat(),
            "versions": versions(),
            "code": code_version(),
            "device": device_facts(config),
            "rounds": [],
        }
        self._write()

    def start(self, clients: Sequence[ClientInfo], fingerprint: str) -> None:
        """Who takes part, on which base."""
        self.data["base"] = fingerprint
        self.data["clients"] = [
            {"client-id": c.client_id, "rank": c.rank, "alpha": c.alpha, "num-examples": c.num_examples}
            for c in clients
        ]
        self._write()

    def baseline(self, metrics: Mapping[str, float]) -> None:
        """Held-out metrics before round 1."""
        self.data["baseline"] = dict(metrics)
        self._scalars("heldout", metrics, 0)
        self._write()

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

    def save_adapter(self, adapter: AdapterState) -> None:
        """The PEFT checkpoint of everything learned so far."""
        from fedlora.peft_io import save_checkpoint

        about = {"config": self._config.to_flat(), "base": self.data.get("base")}
        save_checkpoint(adapter, self.folder / "adapter", self._config.model, about)

    def finish(self, status: str, error: str | None = None) -> None:
        """The last word: completed, interrupted or failed."""
        self.data["status"] = status
        if error:
            self.data["error"] = error
        if self._events:
            self._events.close()
        self._write()

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", value, step)

    def _write(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self._began, 3)
        self.data["peak-memory-bytes"] = peak_memory_bytes()
        write_json(self.folder / "result.json", self.data)


def stamp(config: Config) -> Config:
    """The config with the time as `run.id`, where it has none."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return config if config.run.id else replace(config, run=replace(config.run, id=now))


def folder_of(config: Config) -> Path:
    """Where a run's results go."""
    run = stamp(config).run
    return Path(run.dir).expanduser().resolve() / run.name / run.id


def write_json(path: Path, data: object) -> None:
    """Write whole or not at all, durably. Numbers that are not finite become null."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(_finite(data), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


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
    root = Path(__file__).resolve().parent.parent
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
