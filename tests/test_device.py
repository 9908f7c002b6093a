"""What the tests compute on, and the pretended device that finds what would mix devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlora.models import load_base
from tests import pretended
from tests.device import DEVICE, ON_CPU, VARIABLE, assert_near, assert_same, bound, model_config
from tests.federation import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_the_tests_make_lies_on_their_device(device, tmp_path, tiny_llama, quantization):
    assert device.type == os.environ.get(VARIABLE, "cpu").split(":")[0]
    for config in (model_config(tiny_llama, quantization), tiny(tmp_path, tiny_llama).model):
        base = load_base(config)
        assert base.compute_dtype == torch.float32
        held = [*base.model.parameters(), *base.model.buffers()]
        assert {tensor.device.type for tensor in held} == {device.type}


def test_bounds_come_from_the_number_format():
    assert bound(1e-6) == (1e-6 if ON_CPU else 1e-4)
    assert bound(1e-6, torch.bfloat16) == 5e-2
    assert bound(0.3, torch.bfloat16) == 0.3
    values = torch.tensor([1.0, -8.0])
    assert_near(values.to(DEVICE) + 7e-4, values, bound(1e-4))
    with pytest.raises(AssertionError, match=r"0\.0009 apart, and the largest value is 8"):
        assert_near(values + 9e-4, values, 1e-4)
    with pytest.raises(AssertionError):
        assert_near(values * torch.nan, values, 1e-4)
    with pytest.raises(AssertionError):
        assert_same({"x": values * 1.1}, {"x": values})


MIXED = """
import torch
from tests import pretended

pretended.register()
device = torch.device("pretended:0")
torch.manual_seed(0)
weight, x, index = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([1, 0])
there = weight.to(device).requires_grad_()
out = torch.nn.functional.linear(x.to(device), there)[index]
out.square().sum().backward()
here = weight.clone().requires_grad_()
torch.nn.functional.linear(x, here)[index].square().sum().backward()
assert there.grad.device == out.device == device
assert torch.equal(there.grad.cpu(), here.grad)
there.data[:, 1] = x[0, 1]
assert there[2, 1] == x[0, 1] and weight[2, 1] != x[0, 1]
one, two = (torch.empty(5, device=device).normal_(generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
assert torch.equal(one, two)
refused = {
    "add": lambda: there + x[0],
    "linear": lambda: torch.nn.functional.linear(x, there),
    "cat": lambda: torch.cat([there, weight]),
    "equal": lambda: torch.equal(there, weight),
    "index of a tensor of the CPU": lambda: weight[index.to(device)],
    "in place": lambda: weight.add_(there),
    "numpy": lambda: there.detach().numpy(),
}
for name, mixes in refused.items():
    try:
        mixes()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError(f"{name} is not refused")
print("done")
"""

needs_a_compiler = pytest.mark.skipif(shutil.which(pretended.COMPILER) is None, reason="needs a C++ compiler")


@pytest.mark.slow
@needs_a_compiler
def test_the_pretended_device_computes_as_the_cpu_and_refuses_a_mixture():
    done = subprocess.run([sys.executable, "-c", MIXED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.slow
@pytest.mark.nightly
@needs_a_compiler
@pytest.mark.parametrize("path", ["tests/clients/training", "tests/simulations/test_every_strategy.py"])
def test_training_and_every_strategy_keep_to_one_device(path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", path],
        cwd=ROOT,
        env=os.environ | {VARIABLE: f"{pretended.NAME}:0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
