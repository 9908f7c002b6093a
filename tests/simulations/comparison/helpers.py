"""A made-up comparison folder for tests of the report: random numbers of plausible sizes, measured nowhere."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALL = (
    "fedavg",
    "fedavg-zeropad",
    "rblora",
    "hetlora",
    "flexlora",
    "flora",
    "fedex",
    "florist",
    "lora-fair",
    "ffa",
    "rolora",
    "fedsvd",
    "fedsa",
    "fedsb",
)
_EXACT = {"flora", "fedex", "flexlora", "fedsb"}
_CLIENTS = ("movie", "product", "dialog", "news", "forum", "mail")


def write_comparison(
    folder: Path,
    strategies: Sequence[str] = ALL,
    baselines: Sequence[str] = ("base", "local", "centralised"),
    scenarios: Sequence[str] = ("equal", "half"),
    rates: Sequence[float] = (0.001, 0.004, 0.016),
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 10,
    causal: bool = False,
) -> Path:
    """Write grid.json and one file for each cell."""
    cells = 0
    for scenario in scenarios:
        for label in (*strategies, *baselines):
            for lr in [None] if label == "base" else rates:
                for seed in seeds:
                    path = cell_path(folder, scenario, label, lr, seed)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(cell(scenario, label, lr, seed, rounds, causal)))
                    cells += 1
    grid = {
        "schema": 1,
        "name": "made up",
        "metric": "loss" if causal else "accuracy",
        "reference": strategies[0],
        "learning-rates": list(rates),
        "seeds": list(seeds),
        "strategies": list(strategies),
        "baselines": list(baselines),
        "scenarios": {name: {} if name == "equal" else {"data.partition": "dirichlet"} for name in scenarios},
        "cells": cells,
    }
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder


def cell_path(folder: Path, scenario: str, label: str, lr: float | None, seed: int) -> Path:
    """Where a cell lies."""
    name = f"seed{seed}.json" if lr is None else f"lr{lr:g}-seed{seed}.json"
    return folder / "cells" / scenario / label / name


def cell(scenario: str, label: str, lr: float | None, seed: int, rounds: int, causal: bool) -> dict[str, Any]:
    """One cell of random numbers."""
    rng = random.Random(f"{scenario}/{label}/{lr}/{seed}")
    skill = (
        0.62
        if label == "base"
        else 0.78 + (zlib.crc32(label.encode()) % 100) / 900 - (0.03 if scenario == "half" else 0)
    )
    if lr is not None:
        skill -= 0.03 * abs((0.001, 0.004, 0.016).index(lr) - 1) if lr in (0.001, 0.004, 0.016) else 0.0
    skill += rng.gauss(0, 0.008)
    personal, strategy = label == "fedsa", label not in {"base", "local", "centralised"}
    run = _run(rng, label, skill, rounds, personal, causal)
    one_each = [_run(rng, label, skill, rounds, False, causal) for _ in _CLIENTS]
    return {
        "schema": 1,
        "scenario": scenario,
        "label": label,
        "role": "strategy" if strategy else "baseline",
        "lr": lr,
        "seed": seed,
        "status": "completed",
        "seconds": 30 + 20 * rng.random(),
        "config": {
            "strategy.name": label,
            "train.lr": lr,
            "run.seed": seed,
            "federation.rounds": rounds,
            "lora.rank": 8,
            "data.partition": "natural" if scenario == "equal" else "dirichlet",
        },
        "runs": [] if label == "base" else one_each if label == "local" else [run],
        "scores": {part: _scores(rng, skill, causal) for part in ("validation", "test")},
        "spectra": {f"layer{i}.q": [2.0 * 0.75**k * (1 + rng.random()) for k in range(16)] for i in range(3)}
        if strategy
        else {},
        "partition": {
            "clients": [
                {
                    "client-id": i,
                    "name": name,
                    "rank": (16, 8, 8, 4, 4, 4)[i],
                    "rows": 1000 * (i + 1),
                    "labels": {} if causal else {"0": int(1000 * (i + 1) * rng.random()), "1": 200},
                }
                for i, name in enumerate(_CLIENTS)
            ]
        },
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {"fedlora": "0.1.0", "torch": "2.6"},
        "device": {"device": "cpu", "platform": "Linux"},
    }


def _scores(rng: random.Random, skill: float, causal: bool) -> dict[str, Any]:
    clients = {
        str(i): {"accuracy": skill + rng.gauss(0, 0.03), "loss": 1.5 - skill + rng.gauss(0, 0.04), "examples": 200}
        for i in range(len(_CLIENTS))
    }
    scores = {"accuracy": skill + rng.gauss(0, 0.004), "loss": 1.5 - skill + rng.gauss(0, 0.01), "examples": 1200}
    more = {"perplexity": 3.0, "exact-match": 0.1} if causal else {"macro-f1": skill - 0.01, "calibration-error": 0.05}
    return {**scores, **more, "clients": clients}


def _run(rng: random.Random, label: str, skill: float, rounds: int, personal: bool, causal: bool) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        reached = 0.55 + (skill - 0.55) * (1 - 0.7**number) + rng.gauss(0, 0.004)
        scores = {"loss": 1.5 - reached, "accuracy": reached}
        seconds = {
            "clients": 2 + rng.random(),
            "aggregate": 0.2,
            "encode": 0.1,
            "decode": 0.1,
            "diagnose": 0.2,
            "evaluate": 0.6,
            "save": 0.1,
            "checkpoint": 0.1,
        }
        seconds["round"] = sum(seconds.values())
        entries.append(
            {
                "round": number,
                "train-loss": 1.6 - reached,
                **(
                    {"client-test": {"mean": scores, "clients": {}, "failures": {}}}
                    if personal
                    else {"heldout": scores}
                ),
                "upload-bytes": 300_000 + 10_000 * len(label),
                "download-bytes": (1_500_000 if label == "flora" else 400_000),
                "aggregation-error": None if personal else 1e-15 if label in _EXACT else 0.05 + 0.2 * rng.random(),
                "drift": None if personal else 0.3 + 0.03 * number + rng.gauss(0, 0.02),
                "update-cosine": None if personal else 0.6 - 0.03 * number + rng.gauss(0, 0.02),
                "effective-rank": None if personal else 5 + 0.2 * number + rng.gauss(0, 0.2),
                **({} if personal or causal else {"intruders": {"layer0.q": number // 3, "layer1.q": number // 2}}),
                "seconds": seconds,
                "clients": {str(i): {"train-loss": 1.6 - reached + 0.05 * i, "num-examples": 100} for i in range(6)},
                "failures": {},
            }
        )
    return {
        "schema": 1,
        "status": "completed",
        "key": "0",
        "config": {"strategy.name": label, "model.name": "tiny", "federation.rounds": rounds, "run.name": "made up"},
        "clients": [{"client-id": i, "rank": 8, "alpha": "2r", "num-examples": 100} for i in range(6)],
        **({} if personal else {"baseline": {"loss": 0.95, "accuracy": 0.55}}),
        "rounds": entries,
        "peak-memory-bytes": {"process": int(1.5e9 + 3e8 * rng.random())},
        "seconds": 40.0,
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {"fedlora": "0.1.0"},
        "device": {"device": "cpu"},
    }
