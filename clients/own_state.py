"""What a client keeps on its own disk from round to round: personal factors, what coarse formats left out.

One safetensors file per run, client and kind, read when needed: clients that are not at work cost no memory,
and a client that was restarted goes on where it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlora.adapter import AdapterState, LoraFactors
from fedlora.errors import DataError


def load(folder: Path, kind: str) -> AdapterState | None:
    """What `save` wrote there, or None.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            scalings: dict[str, float] = json.loads(file.metadata()["scalings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it to start this client anew") from None
    lora = {
        name: LoraFactors(
            A=tensors.get(f"{name}|A", torch.empty(0, 0)),
            B=tensors.get(f"{name}|B", torch.empty(0, 0)),
            scaling=scaling,
        )
        for name, scaling in scalings.items()
    }
    dense = {key.removeprefix("dense|"): tensor for key, tensor in tensors.items() if key.startswith("dense|")}
    return AdapterState(lora=lora, dense=dense)


def save(folder: Path, kind: str, state: AdapterState) -> None:
    """Keep this state, whole or not at all; a factor that is empty is left out.

    Args:
        folder: this run's and client's own; see `folder_of`.
        kind: names the file: "personal" or "left-out".
        state: any factors and tensors.
    """
    tensors = {f"dense|{name}": tensor.contiguous() for name, tensor in state.dense.items()}
    for name, factors in state.lora.items():
        for part, tensor in (("A", factors.A), ("B", factors.B)):
            if tensor.numel():
                tensors[f"{name}|{part}"] = tensor.contiguous()
    scalings = {name: factors.scaling for name, factors in state.lora.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part_path, path = folder / f".{kind}.part", folder / f"{kind}.safetensors"
    save_file(tensors, part_path, metadata={"scalings": json.dumps(scalings)})
    with part_path.open("rb") as file:
        os.fsync(file.fileno())
    part_path.replace(path)


def folder_of(root: str | Path, run_id: int, client_id: int) -> Path:
    """`<root>/<run id>/client-<id>`."""
    return Path(root) / str(run_id) / f"client-{client_id}"
