"""A client optimizer of a user's own: over pairs of factors, with two passes; alone and as one batch, both engines."""

from __future__ import annotations

import pytest
import torch

from fedlora.clients.optimizers.registry import OPTIMIZERS
from fedlora.common.errors import ConfigError
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module
from tests.simulations.engines.test_local import apart, saved_adapter

MINE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.clients.optimizers.base import ClientOptimizer, Steps


@dataclass(frozen=True)
class SharpPlus(ClientOptimizer):
    """Sharpness-aware steps (two passes), with a larger rate for B than for A."""

    radius: float = 0.01
    ratio: float = 4.0

    passes: ClassVar[int] = 2
    shares_batch: ClassVar[bool] = True

    def begin(self, trained, config):
        return _Steps(self, trained)


class _Steps(Steps):
    def __init__(self, options, trained):
        self.options, self.trained, self.moved = options, trained, []

    def after_pass(self, number):
        size = torch.stack([p.grad.norm() for p in self.trained.parameters if p.grad is not None]).norm() + 1e-12
        for p in self.trained.parameters:
            step = self.options.radius * p.grad / size
            p.data.add_(step)
            self.moved.append((p, step))

    def step(self, lr):
        for p, step in self.moved:
            p.data.sub_(step)
        self.moved = []
        for pair in self.trained.pairs:
            assert pair.A.shape[0] == pair.B.shape[1]  # one orientation, alone and in a batch of clients
            pair.A.data.sub_(lr * pair.A.grad)
            pair.B.data.sub_(lr * self.options.ratio * pair.B.grad)
        for other in self.trained.others:
            other.data.sub_(lr * other.grad)


@dataclass(frozen=True)
class NotOne:
    pass
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "optimizers_of_mine", MINE) + ":SharpPlus"


def config_of(folder, model, name, **keys):
    return tiny(folder, model, **{"train__optimizer": name, "train__lr": 0.1, "train__steps": 6, **keys})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_federation_learns_and_clients_at_once_are_clients_alone(tmp_path, tiny_llama, mine, quantization):
    adapters = []
    for at_once in ("1", "auto"):
        keys = {"model__quantization": quantization, "train__clients_at_once": at_once, "run__id": f"run-{at_once}"}
        folder, result = run_locally(config_of(tmp_path, tiny_llama, mine, **keys))
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.02
        adapters.append(saved_adapter(folder))
    assert apart(*adapters) <= run_bound(1e-4)


def test_its_options_and_both_passes_count(tmp_path, tiny_llama, mine):
    folders = [
        run_locally(config_of(tmp_path, tiny_llama, mine, run__id=run, train__optimizer_options=options))[0]
        for run, options in (("a", ""), ("b", "radius=0.5"), ("c", "ratio=1"))
    ]
    first, *others = (saved_adapter(folder) for folder in folders)
    assert all(apart(first, other) > 1e-6 for other in others)


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(config_of(tmp_path, tiny_llama, mine))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", "", r"train\.optimizer: unknown client optimizer 'adam' .*did you mean 'adamw'"),
        ("optimizers_of_mine:NotOne", "", "NotOne is no client optimizer; write a frozen dataclass that extends"),
        ("optimizers_of_mine:SharpPlus", "radius=large", r"SharpPlus's radius = 'large' is str, expected float"),
        ("optimizers_of_mine:SharpPlus", "size=1", r"has no option 'size'; did you mean|known are radius, ratio"),
        ("adamw-8bit", "", "needs a CUDA GPU, but the model is on cpu"),
    ],
)
def test_what_is_wrong_is_said_before_the_run(tmp_path, tiny_llama, mine, name, options, message):
    with pytest.raises(ConfigError, match=message):
        run_locally(config_of(tmp_path, tiny_llama, name, train__optimizer_options=options, model__device="cpu"))
    assert not (tmp_path / "runs").exists()


def test_every_built_in_optimizer_says_whether_clients_may_share_a_batch():
    alone = {name for name in OPTIMIZERS.names if not OPTIMIZERS.load(name).shares_batch}
    assert alone == {"adamw-8bit", "paged-adamw", "paged-adamw-8bit"}
    OPTIMIZERS.load("sgd").check(torch.device("cpu"))
