"""Seconds per message on a real node, with the resident worker and without it.

    python -m benchmarks.worker [--quantization nf4] [--rounds 4] [--steps 1]

A server and one node of Flower's own programs on this machine, one after the other with `fedlora node` as it is and
with `--no-worker`; each round is a train and an evaluate message. `ClientApp` is the life of the process that Flower
starts for a message, up to the answer; `server` is what the server waited for a train message, Flower's own polling
and transport included. The first message of each kind, which loads, is counted by itself. Writes
benchmarks/results/worker-<quantization>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT, write
from fedlora.common import processes
from fedlora.results import journal


def measure(options: argparse.Namespace, worker: bool) -> dict[str, Any]:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = folder / "rows.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": f"What is {i} + {i}?", "response": str(2 * i)}) + "\n" for i in range(40))
        )
        node = ["--partition-id", "0", "--data", str(rows), "--worker" if worker else "--no-worker"]
        keys = {
            "run.dir": str(folder / "runs"),
            "run.id": "bench",
            "model.quantization": options.quantization,
            "federation.clients": 1,
            "federation.min-clients": 1,
            "federation.rounds": options.rounds,
            "lora.ranks": "",
            "train.steps": options.steps,
            "evaluate.server": "false",
            "evaluate.clients": "true",
            "data.client-test-fraction": 0.1,
        }
        with site(folder, node) as run:
            told = [word for key, value in keys.items() for word in ("-c", f"{key}={value}")]
            answers = run(str(ROOT / "configs" / "quickstart.toml"), *told)
        result = json.loads((folder / "runs" / "quickstart" / "bench" / "result.json").read_text())
    trained = [entry["clients"]["0"]["train-seconds"] for entry in result["rounds"]]
    waited = [entry["seconds"]["clients"] for entry in result["rounds"]]
    return {"first": answers["train"][0], "answers": answers, "waited": waited, "trained": trained}


@contextmanager
def site(folder: Path, node: list[str]) -> Iterator[Callable[..., dict[str, list[float]]]]:
    """A server and a node of Flower's own programs, without TLS, and a function that has them run something.

    The function takes words of `fedlora run`, and returns the seconds of the processes that Flower started on the node
    for this run's messages, by task.

    Args:
        folder: for logs and states.
        node: words of `fedlora node` besides the server's address and the state folder.
    """
    port = processes.free_port()
    address = ["--server", f"127.0.0.1:{port}", "--insecure"]
    server = ["server", "--insecure", "--port", str(port), "--state", str(folder / "server")]
    events = folder / "node" / journal.NAME

    def run(*words: str) -> dict[str, list[float]]:
        before = len(journal.read(events))
        if _fedlora(["run", *words, *address], folder, "run").wait():
            raise SystemExit((folder / "run.out").read_text())
        found: dict[str, list[float]] = {}
        for event in journal.read(events)[before:]:
            if event["event"] == "message-answered":
                found.setdefault(event["task"], []).append(event["process-seconds"])
        return found

    with (
        _running(server, folder, "listening on"),
        _running(["node", *address, *node, "--state", str(folder / "node")], folder, "started for the server"),
    ):
        yield run


def _fedlora(words: list[str], folder: Path, name: str):
    return processes.start(
        [sys.executable, "-m", "fedlora.cli", *words], folder, os.environ, (folder / f"{name}.out").open("wb")
    )


@contextmanager
def _running(words: list[str], folder: Path, says: str) -> Iterator[None]:
    process = _fedlora(words, folder, words[0])
    output = folder / f"{words[0]}.out"
    try:
        while says not in output.read_text():
            if process.poll() is not None:
                raise SystemExit(output.read_text())
            time.sleep(0.2)
        yield
    finally:
        processes.stop_tree(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="nf4", choices=["none", "int8", "nf4"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    runs = {name: measure(options, name == "with") for name in ("with", "without")}
    table = Table(title=f"seconds per message, SmolLM2-135M, {options.quantization}, {options.steps} steps; medians")
    for title in ("worker", "first", "train", "of it training", "evaluate", "server, train"):
        table.add_column(title, justify="right")
    medians: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        medians[name] = {
            "train": statistics.median(run["answers"]["train"][1:]),
            "evaluate": statistics.median(run["answers"]["evaluate"][1:]),
            "trained": statistics.median(run["trained"][1:]),
            "waited": statistics.median(run["waited"][1:]),
        }
        m = medians[name]
        row = (run["first"], m["train"], m["trained"], m["evaluate"], m["waited"])
        table.add_row(name, *[f"{value:.1f}" for value in row])
    ratios = {key: medians["with"][key] / medians["without"][key] for key in ("train", "evaluate", "waited")}
    table.add_row("ratio", "", f"{ratios['train']:.2f}", "", f"{ratios['evaluate']:.2f}", f"{ratios['waited']:.2f}")
    Console().print(table)
    write(f"worker-{options.quantization}", {"options": vars(options), "runs": runs, "ratios": ratios})


if __name__ == "__main__":
    main()
