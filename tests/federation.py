"""A small federation for tests: four people's rows in a file, a tiny model, a few steps."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flwr.app import Array, RecordDict

from fedlora.config import Config, Scalar, parse
from fedlora.exchange import wire
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.device import COMPUTE_DTYPE, DEVICE

WORDS = ["ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow"]


def write_rows(path: Path, people: int = 4, rows: int = 14) -> Path:
    """Prompt/response rows by person; each person's answers follow their own rule."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for person in range(people):
            for _ in range(rows):
                words = rng.sample(WORDS, 2)
                reply = f"{person} {words[0]}"
                file.write(json.dumps({"prompt": " ".join(words), "response": reply, "person": f"p{person}"}) + "\n")
    return path


def write_labels(path: Path, rows: int = 80) -> Path:
    """Text/label rows of two domains, told apart by one word."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            label = index % 2
            word = ("bad", "good")[label]
            text = f"{rng.choice(WORDS)} {word} {rng.choice(WORDS)}"
            file.write(json.dumps({"text": text, "label": label, "domain": f"d{index % 4 // 2}"}) + "\n")
    return path


def tiny(folder: Path, model: Path, **keys: Scalar) -> Config:
    """A config on the tiny Llama; keys as `lora__rank=4`."""
    base: dict[str, Scalar] = {
        "run.dir": str(folder / "runs"),
        "run.name": "tiny",
        "run.id": "one",
        "run.threads": 1,
        "model.name": str(model),
        "model.quantization": "none",
        "model.device": str(DEVICE),
        "model.compute-dtype": COMPUTE_DTYPE,
        "lora.ranks": "4,2,2,1",
        "lora.target-modules": "q_proj,v_proj,down_proj",
        "data.source": str(write_rows(folder / "rows.jsonl")),
        "data.partition-by": "person",
        "data.max-length": 64,
        "federation.clients": 4,
        "federation.rounds": 2,
        "federation.lost-clients": "accept",  # many tests are about a client that is refused
        "train.steps": 3,
        "train.batch-size": 2,
        "train.lr": 5e-3,
        "train.clients-at-once": "1",  # the bits of a client that is alone, as on its own node
    }
    return parse(base | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


# One of each metric that a client sends with an update.
METRICS = dict.fromkeys(sorted(wire.TRAIN_METRICS), 1.5)


@contextmanager
def tensors_of(record: RecordDict, key: str = "adapter") -> Iterator[dict[str, Any]]:
    """The arrays of a message by name; changes to the mapping go back into the message."""
    arrays = {name: values.copy() for name, values in safetensors.numpy.load(packed(record, key)).items()}
    yield arrays
    repack(record, safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()}), key)


def packed(record: RecordDict, key: str = "adapter") -> bytes:
    """The bytes that carry a message's tensors."""
    return record.array_records[key]["tensors"].data


def repack(record: RecordDict, data: bytes, key: str = "adapter") -> None:
    """Put other bytes in their place."""
    old = record.array_records[key]["tensors"]
    record.array_records[key]["tensors"] = Array(dtype=old.dtype, shape=(len(data),), stype=old.stype, data=data)


def hears_ctrl_c() -> None:
    """In a child before it starts: a run in the background hands down an ignored SIGINT, nohup an ignored SIGHUP."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_locally(config: Config) -> tuple[Path, dict[str, Any]]:
    """Run in this process; `(folder, result)`."""
    simulation.in_process(config)
    folder = folder_of(config)
    return folder, json.loads((folder / "result.json").read_text(encoding="utf-8"))
