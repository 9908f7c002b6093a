"""Checks of this machine: versions, device, a quantization self-test, Flower's programs, the cache."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.common import assets
from fedlora.deployment import superlink_data
from fedlora.results.environment import versions

# Relative error of a quantized product against the dense one, for Gaussian weights. NF4 stores 4 bits with a
# scale per 64 weights (https://arxiv.org/abs/2305.14314), int8 a scale per row: 0.09 and 0.01 are typical.
_WORST = {"nf4": 0.15, "int8": 0.03}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do if the check failed."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""


def examine() -> list[Finding]:
    """The findings of all checks, in the order in which they are shown."""
    findings = [
        Finding(name, version, version != "missing", f"pip install {name}") for name, version in versions().items()
    ]
    findings.append(Finding("device", _device()))
    findings += [quantization_check(kind) for kind in ("nf4", "int8")]
    for program in ("flwr", "flower-superlink"):
        path = Path(sys.executable).with_name(program)
        findings.append(
            Finding(program, str(path), path.exists(), "pip install 'flwr[simulation]' in this environment")
        )
    findings += [*_local_superlink(), *_cache()]
    return findings


def quantization_check(kind: str) -> Finding:
    """Compare the product of a quantized layer with that of its unquantized original."""
    try:
        error = quantization_error(kind)
    except Exception as problem:  # a broken build may raise anything; the error is the finding
        return Finding(f"{kind} self-test", f"{type(problem).__name__}: {problem}", False, "reinstall bitsandbytes")
    ok = error < _WORST[kind]
    advice = f"expected below {_WORST[kind]}; reinstall bitsandbytes"
    return Finding(f"{kind} self-test", f"relative error {error:.3f}", ok, advice)


def quantization_error(kind: str) -> float:
    """Relative error of a 256 x 256 quantized product on this machine's default device."""
    import bitsandbytes as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(256, 256, bias=False)
    dense.weight.data = torch.randn(256, 256, generator=generator)
    inputs = torch.randn(32, 256, generator=generator)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    with torch.no_grad():
        expected = dense(inputs)
        got = layer.to(device)(inputs.to(device)).cpu()
    return float((got - expected).norm() / expected.norm())


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"CUDA: {', '.join(names)}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, compute in fp32"


def _local_superlink() -> list[Finding]:
    """The database that `flwr run` keeps for its own SuperLink on this machine."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    path = home / "local-superlink" / "state.db"
    fault = superlink_data.broken(path)
    return [Finding("flwr run's database", str(path), not fault, fault)] if path.is_file() else []


def _cache() -> list[Finding]:
    folder = assets.cache_dir()
    have = [name for name in assets.known() if assets.cached(name)]
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    enough = free > 2e9
    return [
        Finding("cache", str(folder)),
        Finding(
            "free disk", f"{free / 1e9:.1f} GB", enough, "a quickstart needs 2 GB; set FEDLORA_CACHE to another disk"
        ),
        Finding("cached assets", ", ".join(have) or "none yet; fedlora fetch --all"),
    ]
