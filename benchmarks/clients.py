"""Many clients on one machine: one batch for all of them, against one after another, plain PEFT and Flower with Ray.

    python -m benchmarks.clients [--runs 3] [--quick] [--device cuda:0 --steps 50] [--random FOLDER]

Eight clients take ten optimizer steps each, of rank 8 on q, k, v and o, every example as long as `data.max-length`:

- a, plain: PEFT, AdamW and a for loop, one client after another; nothing sent, nothing aggregated
- b, one at a time: this engine with train.clients-at-once = 1
- c, as one: this engine with train.clients-at-once = 8
- d, ray: `fedlora run --engine flower`, which is `flwr run` with Ray; its wait for the clients, and all of its time

Then the cost per client of a round of 8, 64 and 512 clients, with train.clients-at-once = auto. Each measurement is a
process of its own; the kinds alternate, and medians are compared. Loading is left out, but for the whole time of d.
With --random the bases have random weights and a tokenizer of bytes: a step takes the same time, and nothing is
downloaded.
Memory is the process's peak, on a GPU that of its tensors; d's that of all its processes together. Prints tables, and
writes benchmarks/results/clients.json and docs/clients.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.engine import ROOT, plain_peft, write

CLIENTS, STEPS, RANK = 8, 10, 8
TARGETS = "q_proj,k_proj,v_proj,o_proj"
SETTINGS = {  # name -> base model, quantization, tokens of an example
    "SmolLM2-135M nf4, 1 x 32": ("smollm2-135m-instruct", "nf4", 32),
    "SmolLM2-135M nf4, 1 x 64": ("smollm2-135m-instruct", "nf4", 64),
    "15M Llama fp32, 1 x 32": ("15m", "none", 32),
}
SHAPES = {  # of those bases, as a Llama's config names them
    "smollm2-135m-instruct": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "15m": {
        "vocab_size": 49152,
        "hidden_size": 216,
        "intermediate_size": 576,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 36,
    },
}
GROWTH = (8, 64, 512)


@dataclass(frozen=True)
class Place:
    """Where is measured.

    Attributes:
        device: as model.device names it.
        steps: of each client.
        random: the folder of the bases with random weights; "": the real ones.
    """

    device: str = "cpu"
    steps: int = STEPS
    random: str = ""


def config_of(setting: str, folder: Path, at_once: str, place: Place, *, clients: int = CLIENTS):
    """The run that is measured."""
    from fedlora.config import parse

    model, quantization, length = SETTINGS[setting]
    rows = folder / "rows.jsonl"
    sentence = "The quick brown fox jumps over the lazy dog and runs on through the wet green fields. "
    if not rows.exists():
        rows.write_text("".join(json.dumps({"text": f"{i}: {sentence * 8}"}) + "\n" for i in range(4 * clients)))
    return parse(
        {
            "run.dir": str(folder / "runs"),
            "run.id": "bench",
            "model.name": _base(model, folder, place),
            "model.quantization": quantization,
            "model.device": place.device,
            "model.compute-dtype": "fp32",
            "lora.ranks": "",
            "lora.rank": RANK,
            "lora.target-modules": TARGETS,
            "data.source": str(rows),
            "data.form": "text",
            "data.partition": "iid",
            "data.heldout-fraction": 0.0,
            "data.max-length": length,
            "federation.clients": clients,
            "federation.rounds": 1,
            "strategy.name": "fedavg",
            "train.steps": place.steps,
            "train.batch-size": 1,
            "train.clients-at-once": at_once,
            "evaluate.server": False,
        }
    )


def _base(model: str, folder: Path, place: Place) -> str:
    """The base's name or folder."""
    if place.random:
        return str(random_llama(Path(place.random), model))
    return str(_small_llama(folder)) if model == "15m" else model


def random_llama(folder: Path, model: str) -> Path:
    """The base of random weights, which is made when it is not there yet."""
    from tests.tiny import save_llama

    made = folder / model
    return made if made.exists() else save_llama(made, initializer_range=0.02, **SHAPES[model])


def _small_llama(folder: Path) -> Path:
    """A Llama of 15 million random weights, with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedlora.models.base.folders import resolve

    place = folder / "llama-15m"
    if not place.exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=216,
            intermediate_size=576,
            num_hidden_layers=8,
            num_attention_heads=6,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def engine(setting: str, at_once: str, place: Place, *, clients: int = CLIENTS) -> dict[str, float]:
    """Seconds of the round, messages and aggregation included."""
    from fedlora.models import adapted
    from fedlora.results.run_folder import folder_of
    from fedlora.simulations import run as simulation

    with tempfile.TemporaryDirectory() as scratch:
        config = config_of(setting, Path(scratch), at_once, place, clients=clients)
        adapted.adapted_model(config.model, config.lora)
        simulation.in_process(config)
        [entry] = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    trained = sum(client["train-seconds"] for client in entry["clients"].values())
    return {"seconds": entry["seconds"]["round"], "training": trained, "megabytes": _peak(place.device)}


def plain(setting: str, place: Place) -> dict[str, float]:
    """Seconds of PEFT, AdamW and a for loop."""
    with tempfile.TemporaryDirectory() as scratch:
        seconds = plain_peft(config_of(setting, Path(scratch), "1", place))
    return {"seconds": seconds, "training": seconds, "megabytes": _peak(place.device)}


def ray(setting: str) -> dict[str, float]:
    """Seconds that the server waited for its clients, those of the whole command, and all processes' memory."""
    from fedlora.results.run_folder import folder_of
    from fedlora.simulations.engines import flower

    peak = _Peak()
    with tempfile.TemporaryDirectory() as scratch, peak:
        config = config_of(setting, Path(scratch), "1", Place())
        began = time.perf_counter()
        flower.run(config, at_once=2)
        whole = time.perf_counter() - began
        [entry] = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    trained = sum(client["train-seconds"] for client in entry["clients"].values())
    return {"seconds": entry["seconds"]["round"], "training": trained, "whole": whole, "megabytes": peak.megabytes}


def _peak(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class _Peak:
    """The most memory that this process's children had at one time, looked at four times a second."""

    def __enter__(self) -> None:
        self.megabytes, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.megabytes = max(self.megabytes, total / 2**20)


def measure(kind: str, setting: str, place: Place = Place(), timeout: float | None = None) -> dict[str, float]:
    """One measurement in a fresh process, which may take so many seconds."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.clients", "--only", kind, "--setting", setting]
    command += [f"--device={place.device}", f"--steps={place.steps}", f"--random={place.random}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"{kind}, {setting}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def one(kind: str, setting: str, place: Place) -> dict[str, float]:
    """The measurement that `kind` names."""
    if kind.startswith("growth-"):
        return engine(setting, "auto", replace(place, steps=2), clients=int(kind.removeprefix("growth-")))
    if kind == "d":
        return ray(setting)
    if kind == "a":
        return plain(setting, place)
    return engine(setting, {"b": "1", "c": str(CLIENTS)}[kind], place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="measurements of a, b and c in each setting")
    parser.add_argument("--quick", action="store_true", help="one measurement of each, no Ray, no growth")
    parser.add_argument("--device", default="cpu", help="with another: no Ray, no growth, nothing written")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each client")
    parser.add_argument("--random", default="", metavar="FOLDER", help="bases of random weights; nothing written")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = Place(options.device, options.steps, options.random)
    if options.only:
        print(json.dumps(one(options.only, options.setting, place)))
        return
    runs = 1 if options.quick else options.runs
    short = options.quick or place != Place()
    speeds = {setting: _compare(setting, runs, place, with_ray=not short) for setting in SETTINGS}
    _show_speeds(speeds, options.steps)
    if short:
        return
    growth = {setting: {n: measure(f"growth-{n}", setting) for n in GROWTH} for setting in list(SETTINGS)[::2]}
    _show_growth(growth)
    _draw(growth, ROOT / "docs" / "clients.png")
    write("clients", {"clients": CLIENTS, "steps": STEPS, "rank": RANK, "speeds": speeds, "growth": growth})


def _compare(setting: str, runs: int, place: Place, *, with_ray: bool) -> dict[str, list[dict[str, float]]]:
    taken: dict[str, list[dict[str, float]]] = {"a": [], "b": [], "c": [], "d": []}
    for _ in range(runs):
        for kind in ("a", "b", "c"):
            taken[kind].append(measure(kind, setting, place))
            print(f"{setting}, {kind}: {taken[kind][-1]}", file=sys.stderr)
    if with_ray:
        taken["d"].append(measure("d", setting))
        print(f"{setting}, d: {taken['d'][-1]}", file=sys.stderr)
    return taken


def _median(taken: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in taken)


def _show_speeds(speeds: dict[str, dict[str, list[dict[str, float]]]], steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{CLIENTS} clients x {steps} steps: seconds of a round, times faster than a, peak memory")
    for title in ("", "plain PEFT", "one at a time", "as one", "Ray (2 at a time)"):
        table.add_column(title, justify="right")
    for setting, taken in speeds.items():
        cells = []
        for kind in ("a", "b", "c", "d"):
            if not taken[kind]:
                cells.append("")
                continue
            seconds = _median(taken[kind], "seconds")
            faster = _median(taken["a"], "seconds") / seconds
            cells.append(f"{seconds:.1f} s  {faster:.2f}x  {_median(taken[kind], 'megabytes'):.0f} MB")
            if kind == "d":
                cells[-1] += f", whole {_median(taken[kind], 'whole'):.0f} s"
        table.add_row(setting, *cells)
    Console(width=160).print(table)


def _show_growth(growth: dict[str, dict[int, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="A round of 2 steps each: seconds per client, and peak memory")
    for title in ("", *(f"{n} clients" for n in GROWTH)):
        table.add_column(title, justify="right")
    for setting, taken in growth.items():
        table.add_row(setting, *(f"{t['seconds'] / n:.3f} s  {t['megabytes']:.0f} MB" for n, t in taken.items()))
    Console(width=120).print(table)


def _draw(growth: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for setting, taken in growth.items():
        counts = list(taken)
        left.plot(counts, [taken[n]["seconds"] / n for n in counts], marker="o", label=setting)
        right.plot(counts, [taken[n]["megabytes"] for n in counts], marker="o", label=setting)
    for axes, title in ((left, "seconds per client"), (right, "peak memory, MB")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(GROWTH, [str(n) for n in GROWTH])
        axes.set_xlabel("clients in a round")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
