"""Facts about the environment of a run: versions, commit, device, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from fedlora import __version__
from fedlora.config import Config

_PACKAGES = ("torch", "flwr", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


def versions() -> dict[str, str]:
    """The versions of FedLoRA, of Python, and of the libraries on which results depend."""
    found = {"fedlora": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code_version() -> dict[str, Any]:
    """The commit, and whether there are local changes, in a checkout; empty for an installed wheel."""
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
    """Facts about the machine: device, platform, cores, memory, GPUs."""
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
    """The largest resident memory of this process so far, and its largest GPU allocation, in bytes."""
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
