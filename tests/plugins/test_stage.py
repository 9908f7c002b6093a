"""A privacy stage of a user's own, at all four places; and one that changes nothing. Both engines."""

from __future__ import annotations

import importlib

import pytest

from fedlora.common.errors import ConfigError, StrategyError
from fedlora.config import parse
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module
from tests.simulations.engines.test_local import apart, saved_adapter

MINE = '''
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import map_tensors
from fedlora.exchange.stages import Stage


@dataclass(frozen=True)
class Noisy(Stage):
    """Clipped gradients and noise on what leaves a client; the server counts all clients alike, and adds noise."""

    clip: float = 0.05
    noise: float = 1e-3
    linear: ClassVar[bool] = True

    def gradients(self, parameters):
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(min(1.0, self.clip / (float(p.grad.norm()) + 1e-12)))

    def leaving(self, adapter, sent, seed):
        g = torch.Generator().manual_seed(seed)
        return map_tensors(lambda name, x: x + self.noise * torch.randn(x.shape, generator=g), adapter)

    def arriving(self, updates, number):
        for update in updates:
            yield replace(update, num_examples=1)

    def aggregated(self, before, after, number):
        g = torch.Generator().manual_seed(number)
        return map_tensors(lambda name, x: x + self.noise * torch.randn(x.shape, generator=g), after)


@dataclass(frozen=True)
class NotOne:
    pass
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "stages_of_mine", MINE) + ":Noisy"


def config_of(folder, model, stages, **keys):
    common = {"strategy__name": "fedavg", "lora__ranks": "", "lora__rank": 2, "train__lr": 2e-2, "train__steps": 6}
    return tiny(folder, model, privacy__stages=stages, **common, **keys)


@pytest.mark.parametrize("at_once", ["1", "auto"])
def test_each_place_counts_and_the_run_learns(tmp_path, tiny_llama, mine, at_once):
    plain, before = run_locally(config_of(tmp_path, tiny_llama, "", train__clients_at_once=at_once))
    noisy, result = run_locally(config_of(tmp_path, tiny_llama, mine, run__id="two", train__clients_at_once=at_once))
    assert apart(saved_adapter(plain), saved_adapter(noisy)) > run_bound(1e-3)
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    louder, _ = run_locally(
        config_of(
            tmp_path,
            tiny_llama,
            mine,
            run__id="louder",
            privacy__stages_options="Noisy.noise=1e-2",
            train__clients_at_once=at_once,
        )
    )
    assert apart(saved_adapter(plain), saved_adapter(louder)) > apart(saved_adapter(plain), saved_adapter(noisy))
    same, _ = run_locally(config_of(tmp_path, tiny_llama, "unchanged", run__id="three", train__clients_at_once=at_once))
    assert apart(saved_adapter(plain), saved_adapter(same)) <= run_bound(0.0)
    assert before["status"] == "completed"


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(config_of(tmp_path, tiny_llama, mine))


@pytest.mark.parametrize(
    ("stages", "keys", "error", "message"),
    [
        ("noise", {}, ConfigError, r"privacy\.stages: unknown privacy stage 'noise'"),
        ("stages_of_mine:NotOne", {}, ConfigError, "NotOne is no privacy stage; write a frozen dataclass that extends"),
        (
            "stages_of_mine:Noisy",
            {"privacy.stages-options": "Noisy.clop=1"},
            ConfigError,
            r"privacy\.stages-options: stages_of_mine:Noisy has no option 'clop'; did you mean 'clip'",
        ),
        (
            "stages_of_mine:Noisy",
            {"privacy.stages-options": "noise=1"},
            ConfigError,
            r"privacy\.stages-options: 'noise' is no option of a stage in privacy\.stages.*expected stage\.name=value",
        ),
        (
            "stages_of_mine:Noisy",
            {"strategy.name": "flora"},
            StrategyError,
            r"Noisy needs a result that is a weighted mean.*Flora is not; .*strategy\.name = .*fedavg",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_run(tmp_path, tiny_llama, mine, stages, keys, error, message):
    with pytest.raises(error, match=message):
        run_locally(parse(keys, config_of(tmp_path, tiny_llama, stages)))


def test_statistics_of_round_0_pass_the_stages_of_the_server(tmp_path, tiny_llama, monkeypatch):
    own = """
from dataclasses import dataclass
from fedlora.exchange.stages import Stage

SEEN = []

@dataclass(frozen=True)
class Watching(Stage):
    def arriving(self, updates, number):
        for update in updates:
            SEEN.append((number, update.client_id))
            yield update
"""
    stage = write_module(tmp_path, monkeypatch, "watching_stages", own) + ":Watching"
    config = tiny(tmp_path, tiny_llama, privacy__stages=stage, strategy__name="fedsb", federation__rounds=1)
    run_locally(config)
    seen = importlib.import_module("watching_stages").SEEN
    assert seen == [(number, client) for number in (0, 1) for client in range(config.federation.clients)]
