"""Load time and peak memory of training, by quantization; nf4 and int8 from full precision and from the cache.

    python -m benchmarks.memory [--steps 3]

Every row is a process of its own: SmolLM2-135M, LoRA r=8 on q/k/v/o, batch 2 x 64. Peak memory is the largest
resident set, mapped files included, as the operating system counts it. Prints a table and writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT, write

ROWS = ("none", "int8 first", "int8 cached", "nf4 first", "nf4 cached")


def one(quantization: str, steps: int) -> dict[str, Any]:
    """Load and train in this process."""
    from dataclasses import replace

    import torch

    from fedlora.clients.training import trainer
    from fedlora.config import load
    from fedlora.data import Example
    from fedlora.exchange import ClientInfo
    from fedlora.models import adapted
    from fedlora.results.environment import peak_memory_bytes
    from fedlora.strategies.initializers import uniform

    config = load(ROOT / "configs" / "quickstart.toml", [f"model.quantization={quantization}"])
    imported = peak_memory_bytes()["process"]
    began = time.perf_counter()
    bench = adapted.adapted_model(config.model, config.lora)
    seconds = time.perf_counter() - began
    loaded = peak_memory_bytes()["process"]
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(8):
        ids = torch.randint(5, 40_000, (64,), generator=generator).tolist()
        examples.append(Example({"input_ids": ids, "labels": list(ids)}))
    start = uniform.seeded(config, [ClientInfo(client_id=0, rank=8)])
    parameters = adapted.install(bench, start, {"A", "B"})
    plan = replace(config.train, steps=steps, batch_size=2)
    result = trainer.train(
        bench.task, bench.model, parameters, examples, plan, pad_id=bench.base.pad_id, number=1, rounds=1, seed=0
    )
    return {
        "load-seconds": seconds,
        "imported-bytes": imported,
        "loaded-bytes": loaded,
        "trained-bytes": peak_memory_bytes()["process"],
        "loss": result.loss,
        "step-seconds": result.seconds / result.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=["none", "int8", "nf4"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options.steps)))
        return
    from rich.console import Console
    from rich.table import Table

    from fedlora.common.assets import cache_dir
    from fedlora.models import resolve

    resolve("smollm2-135m-instruct")
    table = Table(title=f"SmolLM2-135M, {options.steps} steps of 2 x 64")
    for title in ("base", "load s", "imports GB", "loaded GB", "trained GB", "loss", "step s"):
        table.add_column(title, justify="right")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:  # a cache of its own: converted models, nothing quantized
        for name in ("assets", "models"):
            (Path(scratch) / name).symlink_to(cache_dir() / name)
        for label in ROWS:
            quantization = label.split()[0]
            if label.endswith("first"):
                shutil.rmtree(Path(scratch) / "quantized", ignore_errors=True)
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"]
            command += ["--only", quantization, f"--steps={options.steps}"]
            environment = os.environ | {"FEDLORA_CACHE": scratch}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            row = rows[label] = json.loads(done.stdout.strip().splitlines()[-1])
            memory = [f"{row[f'{name}-bytes'] / 1e9:.2f}" for name in ("imported", "loaded", "trained")]
            losses = [f"{row['loss']:.4f}", f"{row['step-seconds']:.2f}"]
            table.add_row(label, f"{row['load-seconds']:.1f}", *memory, *losses)
    Console().print(table)
    write("memory", {"steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
