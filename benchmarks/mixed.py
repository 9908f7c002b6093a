"""One pass with many adapters against a pass for each: seconds, by number of rows.

    python -m benchmarks.mixed [--adapters 4] [--rows 4,16] [--repeats 3] [--device cuda:0] [--random FOLDER] [--json]

SmolLM2-135M in nf4 with random adapters of ranks 4, 8, 16 … on q/k/v/o, and the untouched base. Both ways alternate
in one process, with the same batch size in rows; the fastest of the repeats counts. Prints a table, or with --json its
numbers. With --random the base has random weights, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.clients import random_llama
from benchmarks.engine import ROOT


def measure(adapters: int, rows: list[int], repeats: int, overrides: list[str]) -> Iterator[tuple[int, float, float]]:
    """(rows, seconds of one pass, seconds of separate passes)."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from fedlora.config import load
    from fedlora.data import Example
    from fedlora.models import load_base
    from fedlora.tasks.registry import task_of
    from fedlora.trained.mixed import BASE, one_by_one, predict_many

    config = load(ROOT / "configs" / "quickstart.toml", ["model.quantization=nf4", *overrides])
    base = load_base(config.model)
    torch.manual_seed(0)
    model: PeftModel | None = None
    for index in range(adapters):
        lora = LoraConfig(
            r=4 * 2**index, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
        )
        if model is None:
            model = get_peft_model(base.model, lora, adapter_name="a0")  # pyright: ignore[reportAssignmentType, reportArgumentType]
        else:
            model.add_adapter(f"a{index}", lora)
    assert isinstance(model, PeftModel)
    names = [BASE, *(f"a{index}" for index in range(adapters))]
    generator = torch.Generator().manual_seed(0)
    examples: list[Example] = []
    for _ in range(max(rows)):
        ids = torch.randint(5, 40_000, (48,), generator=generator).tolist()
        examples.append(Example({"input_ids": ids, "labels": [-100] * 32 + ids[32:]}))
    for count in rows:
        times: dict[str, list[float]] = {"one": [], "each": []}
        for _ in range(repeats):
            for key, way in (("one", predict_many), ("each", one_by_one)):
                began = time.perf_counter()
                way(
                    task_of(config.model),
                    model,
                    names,
                    examples[:count],
                    batch_size=config.evaluate.batch_size,
                    pad_id=base.pad_id,
                )
                times[key].append(time.perf_counter() - began)
        yield count, min(times["one"]), min(times["each"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rows", default="4,16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="", help="as model.device names it; auto when left out")
    parser.add_argument("--random", default="", metavar="FOLDER", help="a base of random weights, made there once")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overrides = [f"model.device={given.device}"] if given.device else []
    if given.random:
        overrides.append(f"model.name={random_llama(Path(given.random), 'smollm2-135m-instruct')}")
    found = measure(given.adapters, [int(text) for text in given.rows.split(",")], given.repeats, overrides)
    if given.json:
        print(json.dumps([{"rows": rows, "one-pass": one, "separate": each} for rows, one, each in found]))
        return
    print("rows  one pass s  separate s  speed-up")
    for rows, one, each in found:
        print(f"{rows:4d}  {one:10.2f}  {each:10.2f}  {each / one:8.2f}", flush=True)


if __name__ == "__main__":
    main()
