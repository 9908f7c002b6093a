"""Time and memory of steps with privacy of rows, over those of plain steps on the same rows.

    python -m benchmarks.privacy [--repeats 5]

SmolLM2-135M, LoRA r=8 on q/k/v/o, batches of 4 x 64 and 16 x 64 tokens: forward, backward, clipping, noise and AdamW.
Times are processor time, of one thread. Steps of both kinds take turns in one process, so that other work on the
machine meets both. Peak memory is the largest resident set after the plain steps alone, and then after those with
privacy. Each row is a process of its own. Prints a table and writes benchmarks/results/privacy.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.engine import ROOT, write

KINDS, BASES, BATCHES = ("plain", "example"), ("none", "nf4"), (4, 16)


def one(quantization: str, batch: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of a step of each kind, as medians, and this process's peak memory after the first of each."""
    from dataclasses import replace

    import torch

    from fedlora.clients.training import trainer
    from fedlora.clients.training.private import RowPrivacy
    from fedlora.config import load
    from fedlora.data import Example
    from fedlora.exchange import ClientInfo
    from fedlora.models import adapted
    from fedlora.models.per_example import row_gradients
    from fedlora.results.environment import peak_memory_bytes
    from fedlora.strategies.initializers import uniform

    torch.set_num_threads(1)
    config = load(ROOT / "configs" / "quickstart.toml", [f"model.quantization={quantization}"])
    bench = adapted.adapted_model(config.model, config.lora)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 40_000, (64,), generator=generator).tolist() for _ in range(batch)]
    examples = [Example({"input_ids": ids, "labels": list(ids)}) for ids in rows]
    start = uniform.seeded(config, [ClientInfo(client_id=0, rank=8)])
    plan = replace(config.train, steps=1, batch_size=batch)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks: dict[str, int] = {}

    def train(kind: str, **more: Any) -> float:
        parameters = adapted.install(bench, start, {"A", "B"})
        every: dict[str, Any] = {"pad_id": bench.base.pad_id, "number": 1, "rounds": 1, "seed": 0, **more}
        began = time.process_time()
        trainer.train(bench.task, bench.model, parameters, examples, plan, **every)
        return time.process_time() - began

    for repeat in range(repeats + 1):  # the first step of each is not counted
        for kind in KINDS:
            if kind == "plain":
                seconds = train(kind)
            else:  # every row in every step, as in the plain one
                privacy = RowPrivacy(clip=1.0, noise_multiplier=1.0, rate=1.0, expected=batch)
                with row_gradients(bench) as recorded:
                    seconds = train(kind, privacy=privacy, rows=recorded)
            peaks.setdefault(kind, peak_memory_bytes()["process"])
            if repeat:
                times[kind].append(seconds)
    return {"seconds": {kind: median(found) for kind, found in times.items()}, "peak-bytes": peaks}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        quantization, batch = options.only.split("/")
        print(json.dumps(one(quantization, int(batch), options.repeats)))
        return
    rows: dict[str, Any] = {}
    print("base  batch  plain s  example s  ratio  plain GB  example GB  ratio")
    for quantization in BASES:
        for batch in BATCHES:
            cell = f"{quantization}/{batch}"
            rows[cell] = _process(cell, options.repeats)
            s, b = rows[cell]["seconds"], {kind: size / 1e9 for kind, size in rows[cell]["peak-bytes"].items()}
            print(
                f"{quantization:4}  {batch:5}  {s['plain']:7.2f}  {s['example']:9.2f}  {s['example'] / s['plain']:5.2f}"
                f"  {b['plain']:8.2f}  {b['example']:10.2f}  {b['example'] / b['plain']:5.2f}",
                flush=True,
            )
    write("privacy", {"repeats": options.repeats, "rows": rows})


def _process(only: str, repeats: int) -> dict[str, Any]:
    """The numbers of one process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.privacy", f"--only={only}", f"--repeats={repeats}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
