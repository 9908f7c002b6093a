"""What a client keeps on disk comes back bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapter import AdapterState, LoraFactors
from fedlora.clients import own_state
from fedlora.errors import DataError


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    state = AdapterState(
        lora={
            "a.q": LoraFactors(torch.randn(2, 3), torch.randn(4, 2), 0.1),
            "a.v": LoraFactors(torch.empty(0, 0), torch.randn(4, 2).double(), 2.0),
        },
        dense={"head.weight": torch.randn(5)},
    )
    folder = own_state.folder_of(tmp_path, 7, 3)
    assert own_state.load(folder, "personal") is None
    own_state.save(folder, "personal", AdapterState())
    own_state.save(folder, "personal", state)
    got = own_state.load(folder, "personal")
    assert got is not None
    assert got.lora.keys() == state.lora.keys()
    for name, factors in state.lora.items():
        assert got.lora[name].scaling == factors.scaling
        assert torch.equal(got.lora[name].B, factors.B)
        assert got.lora[name].A.numel() == factors.A.numel()
        assert got.lora[name].B.dtype == factors.B.dtype
    assert torch.equal(got.dense["head.weight"], state.dense["head.weight"])
    assert own_state.load(folder, "left-out") is None
    assert [path.name for path in folder.iterdir()] == ["personal.safetensors"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "personal.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"personal\.safetensors: cannot be read"):
        own_state.load(tmp_path, "personal")
