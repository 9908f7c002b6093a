"""The server's state comes back from disk bit by bit, or one sentence says why it does not."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.folds import Folds
from fedlora.common.errors import RunError
from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.registry import NAMES
from fedlora.strategies.server import saved_state
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.naive.clients import Run, start, started, train

STRATEGIES: dict[str, Strategy] = {name: load(name) for name in NAMES} | {
    "momentum-fedavg": ServerOptimizer(load("fedavg")),
    "adam-lora-fair": ServerOptimizer(load("lora-fair"), kind="adam", lr=0.01),
    "restart-1-momentum-fedavg": Restart(ServerOptimizer(load("fedavg")), every=1),
    "restart-2-fedavg-zeropad": Restart(load("fedavg-zeropad"), every=2),
    "median-fedavg": Robust(load("fedavg"), rule="median"),
    "keep-tail-flexlora": load("flexlora", keep_tail=True),
    "uncompacted-flora": Run(load("flora"), compact=False),
}


def after_rounds(strategy: Strategy, rounds: int) -> ServerState:
    """A run of four clients, of unequal ranks where the strategy takes them."""
    ranks = (4, 2, 3, 1) if strategy.unequal_ranks else (3, 3, 3, 3)
    clients = [ClientInfo(client_id=i, rank=rank, num_examples=i + 1) for i, rank in enumerate(ranks)]
    state = started(strategy, strategy.init(start(clients, seed=0)), clients)
    for round in range(1, rounds + 1):
        replies = [train(strategy.broadcast(state, client, round), client, seed=round) for client in clients]
        state = strategy.aggregate(state, replies, round)
    return state


def tensors_of(state: ServerState) -> dict[str, Tensor]:
    parts = {"adapter": state.adapter, **{f"fold {i}": part for i, part in enumerate(state.folds.parts)}}
    parts |= {f"memory {name}": adapter for name, adapter in state.memory.items()}
    found: dict[str, Tensor] = {}
    for where, adapter in parts.items():
        for name, f in adapter.lora.items():
            found |= {f"{where} {name} A": f.A, f"{where} {name} B": f.B}
            found[f"{where} {name} scaling"] = torch.tensor(f.scaling, dtype=torch.float64)
        found |= {f"{where} {name}": tensor for name, tensor in adapter.tensors.items()}
    return found


def assert_same(got: ServerState, expected: ServerState) -> None:
    one, two = tensors_of(got), tensors_of(expected)
    assert list(one) == list(two)  # in the same order: sums are taken in it
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert tensor.shape == two[name].shape, name
        assert torch.equal(tensor, two[name]), name
    assert (got.folds.first, got.folds.version) == (expected.folds.first, expected.folds.version)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategys_state_comes_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    state = after_rounds(STRATEGIES[name], 3)
    saved_state.save(tmp_path / "state", state, 3, "key")
    got = saved_state.load(tmp_path / "state", "key")
    assert got is not None
    assert got[1] == 3
    assert_same(got[0], state)
    assert_same(saved_state.plain(state), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_number_formats_layouts_and_shared_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 8).to(dtype), torch.randn(8, 5).to(dtype).T
    shared = LoraFactors(A=a, B=b, scaling=0.1 + 0.2)
    state = ServerState(
        adapter=AdapterState(lora={"z": shared, "a": shared}, tensors={"head|odd name": torch.randn(()).to(dtype)}),
        folds=Folds((AdapterState(lora={"z": LoraFactors(A=a[:2], B=b[:, :2], scaling=1.0)}),), first=7),
        memory={"empty": AdapterState(), "none": AdapterState(lora={"z": LoraFactors(a[:0], b[:, :0], 1.0)})},
    )
    saved_state.save(tmp_path, state, 7, "key")
    got = saved_state.load(tmp_path, "key")
    assert got is not None
    assert_same(got[0], state)
    plain = saved_state.plain(state)
    assert_same(plain, state)
    for held in (got[0], plain):
        for name, tensor in tensors_of(held).items():
            assert tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    state = after_rounds(load("fedavg"), 1)
    (tmp_path / ".round-9.safetensors.part").write_bytes(b"left by a process that was killed")
    for round in (9, 10):
        saved_state.save(tmp_path, state, round, "key")
        assert [path.name for path in tmp_path.iterdir()] == [f"round-{round}.safetensors"]
    saved_state.save(tmp_path, state, 3, "key")  # played again from the start
    assert [path.name for path in tmp_path.iterdir()] == ["round-3.safetensors"]


def test_where_two_are_left_the_newer_counts(tmp_path: Path) -> None:
    """The process was killed between the new one's last byte and the old one's removal."""
    state = after_rounds(load("fedavg"), 1)
    saved_state.save(tmp_path, state, 9, "key")
    old = (tmp_path / "round-9.safetensors").read_bytes()
    saved_state.save(tmp_path, state, 10, "key")
    (tmp_path / "round-9.safetensors").write_bytes(old)
    got = saved_state.load(tmp_path, "key")
    assert got is not None
    assert got[1] == 10


def test_there_may_be_none(tmp_path: Path) -> None:
    assert saved_state.load(tmp_path / "nowhere", "key") is None


def assert_old_is_whole(folder: Path, old: ServerState) -> None:
    assert [path.name for path in folder.iterdir()] == ["round-1.safetensors"]
    got = saved_state.load(folder, "key")
    assert got is not None
    assert got[1] == 1
    assert_same(got[0], old)


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_disk_that_fails_at_any_step_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old, new = after_rounds(load("flora"), 1), after_rounds(load("flora"), 2)
    saved_state.save(tmp_path, old, 1, "key")

    def full(*args: Any, **_: Any) -> None:
        if step == "save_file":
            Path(args[1]).write_bytes(b"the first bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        target = {"save_file": "fedlora.strategies.server.saved_state.save_file", "fsync": "os.fsync"}
        patch.setattr(target.get(step, "pathlib.Path.replace"), full)
        with pytest.raises(RunError, match=r"round-2\.safetensors: .*No space left.*--resume"):
            saved_state.save(tmp_path, new, 2, "key")
    assert_old_is_whole(tmp_path, old)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        folder = disk / "state"
        old = after_rounds(load("flora"), 1)
        saved_state.save(folder, old, 1, "key")
        large = AdapterState(lora={"q": LoraFactors(torch.randn(8, 2000), torch.randn(2000, 8), 1.0)})
        with pytest.raises(RunError, match=r"round-2\.safetensors: .*No space left.*--resume"):
            saved_state.save(folder, ServerState(adapter=large), 2, "key")
        assert_old_is_whole(folder, old)
        saved_state.save(folder, old, 2, "key")  # the room of the failed one is free again
    finally:
        subprocess.run(["umount", disk], check=True)


def broken(folder: Path, how: str) -> None:
    path = folder / "round-1.safetensors"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif how == "foreign-json":
        save_file({"x": torch.zeros(2)}, path, metadata={"fedlora": "[]"})
    elif how == "newer":
        save_file({"x": torch.zeros(2)}, path, metadata={"fedlora": json.dumps({"schema": 99})})
    elif how == "lacking":
        about = {"schema": 1, "run": "key", "round": 1, "folds": [], "first-fold": 1, "memory": {}}
        about["adapter"] = {"scalings": {"q": 1.0}, "dense": []}
        save_file({"x": torch.zeros(2)}, path, metadata={"fedlora": json.dumps(about)})


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "foreign", "foreign-json", "newer", "lacking"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(tmp_path: Path, how: str) -> None:
    saved_state.save(tmp_path, after_rounds(load("fedavg"), 1), 1, "key")
    broken(tmp_path, how)
    with pytest.raises(
        RunError, match=r"round-1\.safetensors: not a readable state \(.+\); .* start a new one"
    ) as error:
        saved_state.load(tmp_path, "key")
    assert "\n" not in str(error.value)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    saved_state.save(tmp_path, after_rounds(load("fedavg"), 1), 1, "key")
    with pytest.raises(RunError, match=r"round-1\.safetensors: the state of another run"):
        saved_state.load(tmp_path, "other")


def test_a_strange_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "round-two.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"round-two\.safetensors: not the name of a saved state"):
        saved_state.load(tmp_path, "key")
