"""Saves the server's whole state after every round, as one safetensors file, from which a run can be resumed.

The states of the last few rounds are kept, so that a run can go back to them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
_LEARNED = "learned.safetensors"


def save(folder: Path, state: ServerState, number: int, run: str, *, keep: int = 1, also: Collection[int] = ()) -> None:
    """Write the state after a round. Older states are removed only when the new one is on the disk.

    The file's header has, as JSON, everything that is not a tensor: names in order, scalings, the first fold's version.

    Args:
        folder: folder for the states of this run only; made if it is missing.
        state: the state; every tensor keeps its number format.
        number: number of the round that ended with this state.
        run: the run's key, which `load` compares.
        keep: number of states that are kept, those of the last rounds up to this one.
        also: rounds whose states are kept besides.

    Raises:
        RunError: the file cannot be written, for instance on a full disk; older states are then unchanged.
    """
    tensors: dict[str, Tensor] = {}
    about = {
        "schema": SCHEMA,
        "run": run,
        "round": number,
        "adapter": _put(tensors, "adapter", state.adapter),
        "first-fold": state.folds.first,
        "folds": [_put(tensors, f"fold-{index}", part) for index, part in enumerate(state.folds.parts)],
        "memory": {name: _put(tensors, f"memory-{name}", adapter) for name, adapter in state.memory.items()},
    }
    path = folder / f"round-{number}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(_apart(tensors), part, metadata={"fedlora": json.dumps(about)})
        files = {old: _round_of(old) for old in folder.glob(_FILES)}
        kept = sorted((each for each in files.values() if each <= number), reverse=True)[:keep]
        for old in [old for old, each in files.items() if each not in kept and each not in also]:
            old.unlink()
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: the server's state after round {number} cannot be written: {error}; make room, and resume the "
            f"run with: fedlora run --resume {folder.parent}"
        ) from error


def load(folder: Path, run: str, after: int = -1) -> tuple[ServerState, int] | None:
    """The latest state in the folder, and the number of its round; None if there is no state.

    What the run's config says is not in the file: the seed, and the limits of the folds.

    Args:
        folder: folder with the states of this run only.
        run: the run's key.
        after: number of the round whose state is wanted instead of the latest; -1: the latest.

    Raises:
        RunError: the file cannot be read, is not a saved state or is of another run, or the round's state is not kept.
    """
    files = {_round_of(path): path for path in folder.glob(_FILES)}
    if after >= 0 and after not in files:
        there = ", ".join(map(str, sorted(files))) or "none"
        raise RunError(
            f"{folder}: no state after round {after} is kept; there are states after rounds: {there} (run.keep sets "
            "their number)"
        )
    if not files:
        return None
    path = files[after if after >= 0 else max(files)]
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fedlora"])
            if about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {about['schema']}, this version reads {SCHEMA}")

            # copied out of the mapped file, where tensors are not aligned
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
        raise RunError(f"{path}: not a readable state ({error}); this run cannot continue, start a new one") from None
    if owner != run:
        raise RunError(f"{path}: the state of another run; put back this run's own file, or start a new run")
    return state, round


def save_learned(folder: Path, learned: Mapping[str, Tensor], run: str) -> None:
    """Write what the run's allocation learned of the clients in round 0; it holds for the whole run.

    Raises:
        RunError: the file cannot be written.
    """
    path = folder / _LEARNED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(_apart(learned), part, metadata={"run": run})
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written: {error}; make room, and start the run again") from error


def load_learned(folder: Path, run: str) -> dict[str, Tensor] | None:
    """What `save_learned` wrote; None if there is nothing.

    Raises:
        RunError: the file cannot be read, or is of another run.
    """
    path = folder / _LEARNED
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("run") != run:
                raise ValueError("it is of another run")
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: not readable ({error}); this run cannot continue, start a new one") from None


def drop_after(folder: Path, number: int) -> None:
    """Remove the states of rounds after this one, to which the run went back."""
    for path in folder.glob(_FILES):
        if _round_of(path) > number:
            path.unlink()


def plain(state: ServerState) -> ServerState:
    """The same state with every tensor contiguous and in memory of its own, as `load` returns it.

    The rounding of matrix products depends on the layout of the factors. A resumed run has the same bits as one that
    was never interrupted only if both have the same layout.
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
    """Add an adapter's tensors to `tensors`; return its scalings."""
    tensors |= {f"{where}|{name}": tensor for name, tensor in OWN.put(adapter).items()}
    return {name: factors.scaling for name, factors in adapter.lora.items()}


def _get(tensors: Mapping[str, Tensor], where: str, scalings: Mapping[str, float]) -> AdapterState:
    start = f"{where}|"
    return OWN.get({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}, scalings)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and no two in the same memory, which safetensors refuses."""
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
        raise RunError(f"{path}: not the name of a saved state, such as round-3.safetensors; move it elsewhere")
    return int(number)
