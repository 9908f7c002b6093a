"""The server's whole state on disk after every round: one safetensors file, so that a run survives its process.

Those of the last few rounds are kept, to go back to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedlora.adapters import AdapterState, map_tensors
from fedlora.adapters.flat import OWN
from fedlora.adapters.folds import Folds
from fedlora.common.errors import RunError
from fedlora.common.files import replacing

from ..base import ServerState

SCHEMA = 2
_FILES = "round-*.safetensors"


def save(folder: Path, state: ServerState, round: int, run: str, keep: int = 1) -> None:
    """Write the state after this round; others go once the new one is on the disk.

    The file's header holds, as JSON, what is no tensor: names in their order, scalings, the first fold's version.

    Args:
        folder: of this run's checkpoints alone; made when missing.
        state: every tensor keeps its number format.
        round: that ended with this state.
        run: the run's key, held against `load`'s.
        keep: so many states stay, of the last rounds up to this one.

    Raises:
        RunError: the file cannot be written, for instance on a full disk; the older checkpoints are as they were.
    """
    tensors: dict[str, Tensor] = {}
    about = {
        "schema": SCHEMA,
        "run": run,
        "round": round,
        "adapter": _put(tensors, "adapter", state.adapter),
        "first-fold": state.folds.first,
        "folds": [_put(tensors, f"fold-{index}", part) for index, part in enumerate(state.folds.parts)],
        "memory": {name: _put(tensors, f"memory-{name}", adapter) for name, adapter in state.memory.items()},
    }
    path = folder / f"round-{round}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(_apart(tensors), part, metadata={"fedlora": json.dumps(about)})
        files = {old: _round_of(old) for old in folder.glob(_FILES)}
        kept = sorted((number for number in files.values() if number <= round), reverse=True)[:keep]
        for old in [old for old, number in files.items() if number not in kept]:
            old.unlink()
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: the server's state after round {round} cannot be written: {error}; make room, and resume the run "
            f"with: fedlora run --resume {folder.parent}"
        ) from error


def load(folder: Path, run: str, after: int = -1) -> tuple[ServerState, int] | None:
    """The newest state that `save` wrote there, and its round; None when there is none.

    What the run's config says is not in the file: the seed, and the limits of the folds.

    Args:
        folder: of this run's checkpoints alone.
        run: the run's key.
        after: the state after this round in place of the newest.

    Raises:
        RunError: the file cannot be read, is no checkpoint, is another run's, or that of this round is not kept.
    """
    files = {_round_of(path): path for path in folder.glob(_FILES)}
    if after >= 0 and after not in files:
        there = ", ".join(map(str, sorted(files))) or "none"
        raise RunError(
            f"{folder}: no state after round {after} is kept; there are those after rounds: {there} (run.keep says how "
            "many)"
        )
    if not files:
        return None
    path = files[after if after >= 0 else max(files)]
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fedlora"])
            if about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {about['schema']}, this version reads {SCHEMA}")

            # out of the file's map, whose tensors begin anywhere
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            state = ServerState(
                adapter=_get(tensors, "adapter", about["adapter"]),
                folds=Folds(
                    tuple(_get(tensors, f"fold-{index}", part) for index, part in enumerate(about["folds"])),
                    first=int(about["first-fold"]),
                ),
                memory={name: _get(tensors, f"memory-{name}", part) for name, part in about["memory"].items()},
            )
            owner, round = str(about["run"]), int(about["round"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: no readable checkpoint ({error}); this run cannot go on, start a new one") from None
    if owner != run:
        raise RunError(f"{path}: the checkpoint of another run; put back this run's own file, or start a new run")
    return state, round


def drop_after(folder: Path, round: int) -> None:
    """Remove the states of later rounds: a run that went back to this one goes on from it, whatever happens."""
    for path in folder.glob(_FILES):
        if _round_of(path) > round:
            path.unlink()


def plain(state: ServerState) -> ServerState:
    """The same state with every tensor contiguous in memory of its own, as `load` gives it.

    Matrix products round by the layout of what they multiply: a run that goes on from a file and one that was never
    interrupted have the same bits only if both hold the same layout.
    """
    return replace(
        state,
        adapter=_plain(state.adapter),
        folds=replace(state.folds, parts=tuple(_plain(part) for part in state.folds.parts)),
        memory={name: _plain(adapter) for name, adapter in state.memory.items()},
    )


def _plain(adapter: AdapterState) -> AdapterState:
    def own(name: str, tensor: Tensor) -> Tensor:
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)

    return map_tensors(own, adapter)


def _put(tensors: dict[str, Tensor], where: str, adapter: AdapterState) -> dict[str, float]:
    """Adds one adapter's tensors; returns its scalings."""
    tensors |= {f"{where}|{name}": tensor for name, tensor in OWN.put(adapter).items()}
    return {name: factors.scaling for name, factors in adapter.lora.items()}


def _get(tensors: Mapping[str, Tensor], where: str, scalings: Mapping[str, float]) -> AdapterState:
    start = f"{where}|"
    return OWN.get({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}, scalings)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two of them in the same memory, which safetensors refuses."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        where = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if where in seen else plain
        seen.add(where)
    return apart


def _round_of(path: Path) -> int:
    number = path.stem.removeprefix("round-")
    if not number.isdigit():
        raise RunError(f"{path}: not a name of a checkpoint, such as round-3.safetensors; move it elsewhere")
    return int(number)
