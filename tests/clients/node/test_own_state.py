"""What a client keeps on disk comes back bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.node import own_state
from fedlora.common.errors import DataError


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    state = AdapterState(
        lora={
            "a.q": LoraFactors(torch.randn(2, 3), torch.randn(4, 2), 0.1),
            "a.v": LoraFactors(torch.empty(0, 0), torch.randn(4, 2).double(), 2.0),
        },
        tensors={"head.weight": torch.randn(5)},
    )
    folder = own_state.folder_of(tmp_path, 7, 3)
    assert own_state.load(folder, "personal", 99) is None
    own_state.save(folder, "personal", AdapterState(), 1)
    own_state.save(folder, "personal", state, 1)
    got = own_state.load(folder, "personal", 2)
    assert got is not None
    assert got.lora.keys() == state.lora.keys()
    for name, factors in state.lora.items():
        assert got.lora[name].scaling == factors.scaling
        assert torch.equal(got.lora[name].B, factors.B)
        assert got.lora[name].A.numel() == factors.A.numel()
        assert got.lora[name].B.dtype == factors.B.dtype
    assert torch.equal(got.tensors["head.weight"], state.tensors["head.weight"])
    assert own_state.load(folder, "left-out", 2) is None
    assert [path.name for path in folder.iterdir()] == ["personal-1.safetensors"]


def kept(value: float) -> AdapterState:
    return AdapterState(tensors={"x": torch.tensor([value])})


def held(folder: Path, number: int) -> float | None:
    found = own_state.load(folder, "personal", number)
    return None if found is None else float(found.tensors["x"])


def test_a_round_that_is_played_again_starts_from_what_there_was(tmp_path: Path) -> None:
    """The server died after this client trained round 7, and plays it again; the client skipped rounds 4 to 6."""
    for round in (1, 3, 7):
        own_state.save(tmp_path, "personal", kept(round), round)
    assert [held(tmp_path, round) for round in (8, 7, 6, 4, 3)] == [7, 3, 3, 3, None]
    own_state.save(tmp_path, "personal", kept(7.5), 7)
    assert [held(tmp_path, round) for round in (8, 7)] == [7.5, 3]


def test_what_was_made_in_rounds_that_were_undone_goes(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        own_state.save(tmp_path, "personal", kept(round), round)
    own_state.save(tmp_path, "personal", kept(2.5), 2)
    assert [held(tmp_path, round) for round in (9, 3, 2)] == [2.5, 2.5, None]


def test_two_rounds_are_kept_of_each_kind(tmp_path: Path) -> None:
    for round in range(1, 12):
        own_state.save(tmp_path, "personal", kept(round), round)
    own_state.save(tmp_path, "left-out", kept(0), 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "personal-10.safetensors",
        "personal-11.safetensors",
        "left-out-1.safetensors",
    }


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "personal-1.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"personal-1\.safetensors: cannot be read"):
        own_state.load(tmp_path, "personal", 2)
