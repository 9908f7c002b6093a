"""The device that the tests compute on, and how near two computations of one thing come to each other there.

FEDLORA_TEST_DEVICE names it, such as cuda:0; without it, it is the CPU. The tests compute in fp32 on every device, so
that a bound that tells a right formula from a wrong one does so everywhere. A test of another number format names the
format. All bounds come from the format: `bound` of one computation, `run_bound` of a whole run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fedlora.config import ModelConfig
from fedlora.models import pick_device
from tests import pretended

VARIABLE = "FEDLORA_TEST_DEVICE"
NAMED = os.environ.get(VARIABLE) or "cpu"
if NAMED.startswith(pretended.NAME):
    pretended.register()
DEVICE = pick_device(NAMED, VARIABLE)
ON_CPU = DEVICE.type == "cpu"
COMPUTE_DTYPE = "fp32"

# What is stated of the CPU alone: a refusal there, or numbers that were recorded there.
cpu_only = pytest.mark.skipif(not ON_CPU, reason="is about the CPU")

# Processes that a test starts do not know the pretended device.
starts_processes = pytest.mark.skipif(DEVICE.type == pretended.NAME, reason="its processes do not know the device")

# Some hundred times the rounding of fp32, and ten times that of the narrow formats, whose sums are kept in fp32.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A last bit that an upload in int8 rounds the other way is a whole code.
_RUN = 1e-2
_Batch = TypeVar("_Batch", Tensor, Mapping[str, Tensor])


def bound(on_cpu: float, dtype: torch.dtype = torch.float32) -> float:
    """How far apart two ways of computing one thing may be, as a share of its size.

    Args:
        on_cpu: what fp32 keeps on the CPU; elsewhere, and in other formats, no bound is tighter than the format's own.
        dtype: that the model computes in.
    """
    return on_cpu if ON_CPU and dtype == torch.float32 else max(on_cpu, _TOLERANCES[dtype])


def run_bound(on_cpu: float) -> float:
    """The same of the adapters of two whole runs, whose rounding goes through several rounds."""
    return on_cpu if ON_CPU else max(on_cpu, _RUN)


def activations(quantization: str) -> torch.dtype:
    """The coarsest format that a base's activations go through in fp32: on a GPU, bitsandbytes casts int8's to fp16."""
    return torch.float16 if quantization == "int8" and not ON_CPU else torch.float32


def assert_near(got: Tensor, expected: Tensor, share: float) -> None:
    """The largest difference is at most this share of what is largest in `expected`; wherever the two lie."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape
    assert got.isfinite().all()
    apart, size = float((got - expected).abs().max()), float(expected.abs().max())
    assert apart <= share * size, f"{apart:.3g} apart, and the largest value is {size:.3g}"


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The updates of two runs that should agree: to the bit on the CPU, elsewhere within `run_bound`.

    A GPU's libraries choose the order of a sum by the shapes, and atomic additions come in any order.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if ON_CPU:
            assert torch.equal(got[name], tensor), name
        else:
            assert_near(got[name], tensor, run_bound(0.0))


def assert_same_figures(got: Any, expected: Any) -> None:
    """What the records of two runs that should agree hold: equal on the CPU, elsewhere within `run_bound`."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_figures(got[name], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for mine, value in zip(got, expected, strict=True):
            assert_same_figures(mine, value)
    elif ON_CPU or not isinstance(expected, float):
        assert got == expected
    else:  # a share of examples that are right moves by whole examples
        assert got == pytest.approx(expected, rel=run_bound(0.0), abs=0.1)


def on_device(batch: _Batch) -> _Batch:
    """A tensor, or a batch of them, where the tests' models are."""
    if isinstance(batch, Tensor):
        return batch.to(DEVICE)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}  # pyright: ignore[reportReturnType]


def model_config(folder: object, quantization: str = "none", **changes: Any) -> ModelConfig:
    """A base on the tests' device."""
    config = ModelConfig(name=str(folder), quantization=quantization, device=str(DEVICE), compute_dtype=COMPUTE_DTYPE)
    return replace(config, **changes)
