"""Two runs at once, against one alone on the same machine.

    python -m benchmarks.contention [--runs 2] [--repeat 3] [--engine local] [--devices cpu,cpu] [--spinning]

Each run is a `fedlora run` of its own: four clients of unequal ranks train a random model with four layers of
SmolLM2-135M's sizes, in nf4. The time is the whole command's, from start to end, and what it took of the cores: that
does not depend on what else the machine does, and shows threads that spin. One alone and several at once are taken by
turns; ratios are those of the medians, and the number of runs is what perfect sharing gives. `--spinning` lets OpenMP's
threads spin while they wait, which is their default, for comparison. Writes benchmarks/results/contention.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.engine import write
from fedlora.common import processes
from tests.tiny import save_llama

_SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 4,
}


def at_once(count: int, words: list[str], folder: Path, spinning: bool) -> tuple[float, float]:
    """Seconds until the last of so many equal runs has ended, and seconds of the cores that all took."""
    own = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "30000000000"} if spinning else {}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            output = folder / f"run{number}.out"
            place = ["-c", f"run.dir={folder}", "-c", f"run.id={time.monotonic_ns()}"]
            command = [sys.executable, "-m", "fedlora.cli", *words, *place]
            running.append(processes.start(command, folder, os.environ | own, output.open("wb")))
        for number, process in enumerate(running):
            if process.wait():
                raise SystemExit((folder / f"run{number}.out").read_text())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - began, cores
    finally:
        for process in running:
            if process.poll() is None:
                processes.stop_tree(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", default="local", choices=["local", "flower"])
    parser.add_argument("--devices", default="")
    parser.add_argument("--spinning", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_llama(folder / "model", **_SIZES)
        words = run_words(folder, model, options)
        at_once(1, words, folder, options.spinning)  # quantizes the model, for all that follow
        seconds: dict[int, list[tuple[float, float]]] = {1: [], options.runs: []}
        for _ in range(options.repeat):
            for count, times in seconds.items():
                times.append(at_once(count, words, folder, options.spinning))
                print(f"{count} at once: {times[-1][0]:.1f} s, {times[-1][1]:.1f} s of the cores", flush=True)
    medians = {
        count: [statistics.median(column) for column in zip(*found, strict=True)] for count, found in seconds.items()
    }
    ratio, cores = (medians[options.runs][i] / medians[1][i] for i in range(2))
    print(
        f"{options.runs} runs at once take {ratio:.2f} times as long as one, and {cores:.2f} times the cores' time "
        f"({options.runs} is perfect sharing)"
    )
    name = "contention-spinning" if options.spinning else "contention"
    write(name, {"options": vars(options), "seconds": seconds, "medians": medians, "ratio": ratio, "cores": cores})


def run_words(folder: Path, model: Path, options: argparse.Namespace) -> list[str]:
    """A small federation's command."""
    keys = {
        "model.name": model,
        "model.device": "cpu",
        "model.quantization": "nf4",
        "data.source": _rows(folder / "rows.jsonl"),
        "data.partition": "iid",
        "data.max-length": 64,
        "federation.rounds": options.rounds,
        "train.steps": 8,
    }
    (folder / "run.toml").write_text("".join(f"{key} = {_toml(value)}\n" for key, value in keys.items()))
    words = ["run", str(folder / "run.toml"), "--engine", options.engine]
    return words + (["--devices", options.devices] if options.devices else [])


def _toml(value: object) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'


def _rows(path: Path) -> Path:
    lines = [f'{{"prompt": "What is {i} plus {i}, and why so?", "response": "It is {2 * i}."}}\n' for i in range(200)]
    path.write_text("".join(lines))
    return path


if __name__ == "__main__":
    main()
