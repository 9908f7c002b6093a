"""What a run costs by the number of its registered clients, of which the same number train in each round.

    python -m benchmarks.scale [--registered 100,1000,10000,100000] [--sampled 100] [--rounds 3] [--schedule buffered]

Each run is a process of its own: a tiny random Llama, two rows for each client, one step of one row. The time to start
is from the beginning of the run to the first round, with the reading of the rows, the question to all clients who they
are, and the held-out rows' first score; the base model and the libraries are loaded before. All times are of the
processor, since other work may keep the machine busy; the clock's time is in the file of results. Ratios are against
the first number. `--profile start` or `--profile rounds` prints where the first number's time goes instead. Writes
benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT, write

_MB = 1 << 20


def settings(registered: int, options: argparse.Namespace, folder: Path):
    """A run of one step of one row for each client, on a tiny random model."""
    from fedlora.config import parse
    from tests.tiny import save_llama

    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(2 * registered + 16):
            file.write(json.dumps({"prompt": f"number {number % 97}", "response": f"is {number % 89}"}) + "\n")
    return parse(
        {
            "run.dir": str(folder),
            "run.id": "bench",
            "run.threads": 1,
            "model.name": str(save_llama(folder / "model")),
            "model.quantization": "none",
            "lora.ranks": "4,2,2,1",
            "lora.target-modules": "q_proj,v_proj",
            "data.source": str(rows),
            "data.partition": "iid",
            "data.max-length": 64,
            "data.heldout-fraction": 16 / (2 * registered + 16),
            "data.heldout-max": 8,
            "federation.clients": registered,
            "federation.fraction": options.sampled / registered,
            "federation.rounds": options.rounds,
            "federation.schedule": options.schedule,
            "strategy.name": "fedavg-zeropad",
            "train.steps": 1,
            "train.batch-size": 1,
            "train.clients-at-once": "16",
        }
    )


def one(registered: int, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one run in this process."""
    from fedlora.common.events import listen
    from fedlora.models import adapted
    from fedlora.results.environment import peak_memory_bytes
    from fedlora.results.run_folder import folder_of
    from fedlora.simulations import run as simulation

    starts: list[float] = []
    clock = time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        config = settings(registered, options, Path(scratch))
        adapted.adapted_model(config.model, config.lora)
        before = peak_memory_bytes()["process"]
        began, wall = clock(), time.perf_counter()
        with listen(lambda kind, facts: starts.append(clock()) if kind == "round-start" else None):
            simulation.in_process(config)
        ended = clock()
        folder = folder_of(config)
        rounds = [after - start for start, after in zip(starts, [*starts[1:], ended], strict=True)]
        return {
            "registered": registered,
            "wall": time.perf_counter() - wall,
            "start": starts[0] - began,
            "round": statistics.median(rounds),
            "client": statistics.median(rounds) / options.sampled,
            "memory": peak_memory_bytes()["process"] / _MB,
            "before": before / _MB,
            "result": (folder / "result.json").stat().st_size / _MB,
            "events": (folder / "events.jsonl").stat().st_size / _MB,
            "state": sum(file.stat().st_size for file in (folder / "state").rglob("*")) / _MB,
        }


def measure(registered: int, options: argparse.Namespace) -> dict[str, float]:
    """One run in a fresh process."""
    words = [f"--{name}={getattr(options, name)}" for name in ("sampled", "rounds", "schedule")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scale", "--only", str(registered), *words]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def profiled(registered: int, options: argparse.Namespace) -> None:
    """Print the functions in which a run's time goes."""
    import cProfile
    import pstats

    from fedlora.common.events import listen

    profile = cProfile.Profile()

    def heard(kind: str, facts: dict[str, Any]) -> None:
        if kind == "round-start" and facts["round"] == 1:
            profile.disable() if options.profile == "start" else profile.enable()

    with listen(heard):
        if options.profile == "start":
            profile.enable()
        one(registered, options)
    profile.disable()
    pstats.Stats(profile).sort_stats("cumulative").print_stats(r"(fedlora|strategies|simulations|clients)/", 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registered", default="100,1000,10000,100000")
    parser.add_argument("--sampled", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schedule", default="synchronous", choices=["synchronous", "buffered", "deadline"])
    parser.add_argument("--profile", default="", choices=["start", "rounds"])
    parser.add_argument("--only", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options)))
        return
    numbers = [int(number) for number in options.registered.split(",")]
    if options.profile:
        return profiled(numbers[0], options)
    from rich.console import Console
    from rich.table import Table

    titles = ("registered", "to start s", "a round s", "a client s", "peak MB", "result MB", "events MB", "state MB")
    table = Table(*titles, title=f"{options.sampled} clients a round, {options.schedule}")
    found: list[dict[str, Any]] = []
    for number in numbers:
        found.append(this := measure(number, options))
        print(json.dumps(this), flush=True)
        first = found[0]
        ratio = {name: this[name] / first[name] for name in ("start", "round", "client", "memory")}
        table.add_row(
            f"{number:,}",
            f"{this['start']:.2f} ({ratio['start']:.1f})",
            f"{this['round']:.2f} ({ratio['round']:.2f})",
            f"{this['client']:.4f} ({ratio['client']:.2f})",
            f"{this['memory']:.0f} ({ratio['memory']:.2f})",
            *(f"{this[name]:.2f}" for name in ("result", "events", "state")),
        )
    Console(width=140).print(table)
    write("scale" if options.schedule == "synchronous" else f"scale-{options.schedule}", {"runs": found})


if __name__ == "__main__":
    main()
