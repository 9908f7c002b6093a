"""The in-process engine against a bare PEFT loop that takes the same optimizer steps on the same batches.

    python -m benchmarks.engine [--quantization nf4] [--strategy lora-fair] [--steps 4] [--rounds 2] [--pairs 3]

Each measurement is a process of its own, and the two alternate, so that a machine whose speed drifts treats
both alike. Loading is left out on both sides; what the engine adds is messages, checks, aggregation, the
adapter's checkpoint and the record. Prints a table and writes benchmarks/results/engine-<strategy>-<quantization>.json.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.config import Config

ROOT = Path(__file__).resolve().parent.parent


def settings(options: argparse.Namespace):
    """The quickstart, cut to what is compared: training and what surrounds it, no evaluation."""
    from fedlora.config import load

    return load(
        ROOT / "configs" / "quickstart.toml",
        [
            f"model.quantization={options.quantization}",
            f"strategy.name={options.strategy}",
            f"train.steps={options.steps}",
            f"federation.rounds={options.rounds}",
            "evaluate.server=false",
            f"run.dir={tempfile.mkdtemp()}",
            "run.id=bench",
        ],
    )


def engine(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of all rounds, and the share of them in which no client trained."""
    from fedlora.models import adapted
    from fedlora.results.run_folder import folder_of
    from fedlora.simulations import run as simulation

    config = settings(options)
    adapted.adapted_model(config.model, config.lora)
    simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text())
    wall = sum(entry["seconds"]["round"] for entry in result["rounds"])
    trained = sum(c["train-seconds"] for entry in result["rounds"] for c in entry["clients"].values())
    return {"seconds": wall, "not-training": 1 - trained / wall}


def bare(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of PEFT, AdamW and a for loop."""
    return {"seconds": plain_peft(settings(options))}


def plain_peft(config: Config) -> float:
    """Seconds of PEFT, AdamW and a for loop: one client after another, nothing sent, nothing aggregated."""
    import torch
    from peft import LoraConfig, get_peft_model

    from fedlora.clients.training.schedule import hash_seed
    from fedlora.config import client_rank
    from fedlora.data import LazyExamples, batch_at, prepare
    from fedlora.models import load_base
    from fedlora.tasks.registry import task_of

    base, task = load_base(config.model), task_of(config.model)
    split = prepare(config)
    model: Any = None
    began = 0.0
    for round in range(config.federation.rounds):
        for client in range(config.federation.clients):
            rank = client_rank(config.lora, client)
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=config.lora.target_modules.split(","))
            if model is None:
                model = get_peft_model(base.model, lora)
                began = time.perf_counter()
            else:
                model.delete_adapter("default")
                model.add_adapter("default", lora)
                model.set_adapter("default")
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=0.0, fused=True)
            examples = LazyExamples(split.client(client), base.tokenizer, config.data, task)
            model.train()
            for step in range(config.train.steps):
                seed = hash_seed(config.run.seed, client)
                index = round * config.train.steps + step
                chosen = batch_at(len(examples), config.train.batch_size, index, seed)
                batch = {
                    name: t.to(base.device)
                    for name, t in task.collate([examples[i] for i in chosen], base.pad_id).items()
                }
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.train.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter() - began


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process."""
    words = [f"--{name}={getattr(options, name)}" for name in ("quantization", "strategy", "steps", "rounds")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engine", "--only", kind, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="nf4", choices=["none", "int8", "nf4"])
    parser.add_argument("--strategy", default="lora-fair", help="flora adds the anchor's products to every step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=["engine", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(engine(options) if options.only == "engine" else bare(options)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"4 clients x {options.rounds} rounds x {options.steps} steps, {options.quantization}, {options.strategy}"
    )
    for title in ("pair", "engine s", "bare loop s", "ratio", "not training"):
        table.add_column(title, justify="right")
    pairs = []
    for number in range(1, options.pairs + 1):
        ours, plain = measure("engine", options), measure("bare", options)
        pairs.append({"engine": ours, "bare": plain, "ratio": ours["seconds"] / plain["seconds"]})
        table.add_row(
            str(number),
            f"{ours['seconds']:.1f}",
            f"{plain['seconds']:.1f}",
            f"{pairs[-1]['ratio']:.3f}",
            f"{ours['not-training']:.1%}",
        )
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    share = statistics.median(pair["engine"]["not-training"] for pair in pairs)
    table.add_row("median", "", "", f"{ratio:.3f}", f"{share:.1%}")
    Console().print(table)
    write(
        f"engine-{options.strategy}-{options.quantization}",
        {"options": vars(options), "pairs": pairs, "ratio": ratio, "not-training": share},
    )


def write(name: str, data: dict[str, Any]) -> None:
    """Keep a benchmark's numbers with the versions they were taken on."""
    from fedlora.common.files import write_json
    from fedlora.results.environment import code_version, versions

    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", data | {"versions": versions(), "code": code_version()})


if __name__ == "__main__":
    main()
