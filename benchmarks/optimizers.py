"""Processor time of one step of each client optimizer, without the passes through the model.

    python -m benchmarks.optimizers [--repeats 7]

The parameters are LoRA factors of rank 16 on q, k, v and o of SmolLM2-135M (120 modules), with random gradients, and B
as it is in the middle of training. One thread; optimizers take turns, so that other work on the machine meets all of
them. Prints a table of medians and writes benchmarks/results/optimizers.json.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import nn

from benchmarks.engine import write
from fedlora.clients.optimizers.registry import OPTIMIZERS, optimizer
from fedlora.config import TrainConfig
from fedlora.models.trainable import Pair, Trainable

LAYERS, RANK = 30, 16
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
MEASURED = ("adamw", "sgd", "lora-plus", "lora-rite", "lora-pro", "riemannian", "allora", "sam", "glad")


def factors(generator: torch.Generator) -> Trainable:
    """The parameters of one client."""
    pairs = [
        Pair(
            f"{layer}.{name}",
            nn.Parameter(torch.randn(RANK, d_in, generator=generator) / d_in**0.5),
            nn.Parameter(torch.randn(d_out, RANK, generator=generator) * 0.01),
            2.0,
        )
        for layer in range(LAYERS)
        for name, (d_out, d_in) in SHAPES.items()
    ]
    return Trainable(pairs, [p for pair in pairs for p in (pair.A, pair.B)])


def measure(repeats: int) -> dict[str, float]:
    """Seconds of one step by optimizer, as medians."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    running = {}
    for name in MEASURED:
        config = TrainConfig(optimizer=name, lr=1e-4)
        trained, method = factors(generator), optimizer(config)
        running[name] = trained, method, method.begin(trained, config)
    times: dict[str, list[float]] = {name: [] for name in MEASURED}
    for repeat in range(repeats + 1):  # the first step makes the state, and is not counted
        for name, (trained, method, steps) in running.items():
            taken = 0.0
            for passed in range(method.passes):
                for parameter in trained.parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
                began = time.process_time()
                if passed < method.passes - 1:
                    steps.after_pass(passed)
                else:
                    steps.step(1e-4)
                taken += time.process_time() - began
            if repeat:
                times[name].append(taken)
    return {name: median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    found = measure(parser.parse_args().repeats)
    print("optimizer     ms per step  x AdamW  passes")
    for name, seconds in found.items():
        passes = OPTIMIZERS.load(name).passes
        print(f"{name:12s}  {1e3 * seconds:11.1f}  {seconds / found['adamw']:7.1f}  {passes:6d}")
    write("optimizers", {"processor-seconds": found})


if __name__ == "__main__":
    main()
