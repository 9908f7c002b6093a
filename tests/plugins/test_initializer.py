"""An initializer of a user's own that asks clients for a statistic of their own, in a round 0; both engines."""

from __future__ import annotations

import pytest

from fedlora.common.errors import ConfigError, RunError, StrategyError
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module
from tests.simulations.engines.test_local import apart, saved_adapter

MINE = '''
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.statistics.base import Statistic
from fedlora.clients.training.trainer import TrainResult
from fedlora.strategies.initializers.base import Initializer, Start
from fedlora.tasks.losses import inputs_of
from fedlora.tasks.registry import task_of


@dataclass(frozen=True)
class MeanInput(Statistic):
    """The mean of each module's inputs, as the first row of A."""

    def measure(self, model, asked, examples, config, seed):
        sums, handles = {}, []
        for name, layer in model.layers.items():
            def see(module, inputs, output, name=name):
                sums[name] = sums.get(name, 0) + inputs[0].detach().flatten(0, -2).mean(dim=0).cpu()

            handles.append(layer.register_forward_hook(see))
        batch = model.task.collate([examples[0], examples[1]], model.base.pad_id)
        with torch.no_grad():
            model.model(**inputs_of(model.model, batch))
        for handle in handles:
            handle.remove()
        lora = {
            name: LoraFactors(A=sums[name].expand_as(f.A).clone(), B=torch.zeros_like(f.B), scaling=1.0)
            for name, f in asked.lora.items()
        }
        return AdapterState(lora=lora, tensors=asked.tensors), TrainResult(0.0, 0.0, 0, 0, 0.0)


@dataclass(frozen=True)
class AlongTheInput(Initializer):
    """The first row of A is the mean input of all clients; and one frozen fold shows that a start may have one."""

    size: float = 1.0
    statistic: ClassVar[str] = "initializers_of_mine:MeanInput"

    def start(self, adapter, replies):
        total, lora = 0, {name: f.A.clone() for name, f in adapter.lora.items()}
        first = {name: torch.zeros(f.A.shape[1]) for name, f in adapter.lora.items()}
        for reply in replies:
            total += reply.num_examples
            for name, f in reply.adapter.lora.items():
                first[name] += reply.num_examples * f.A[0]
        for name, A in lora.items():
            A[0] = self.size * first[name] / total
        made = {name: replace(f, A=lora[name]) for name, f in adapter.lora.items()}
        frozen = {name: LoraFactors(A=f.A[:1], B=0.01 * torch.ones(f.B.shape[0], 1), scaling=-1.0)
                  for name, f in made.items()}
        return Start(replace(adapter, lora=made), folds=(AdapterState(lora=frozen),))


@dataclass(frozen=True)
class Spoiled(Initializer):
    def start(self, adapter, replies):
        return Start(AdapterState(lora={name: replace(f, A=f.A[:, :1]) for name, f in adapter.lora.items()}))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "initializers_of_mine", MINE) + ":AlongTheInput"


def config_of(folder, model, name, **keys):
    return tiny(folder, model, **{"lora__init": name, "train__lr": 2e-2, "train__steps": 6, **keys})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_starts_from_what_clients_measured(tmp_path, tiny_llama, mine, quantization):
    folder, result = run_locally(config_of(tmp_path, tiny_llama, mine, model__quantization=quantization))
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert "heldout" not in result["rounds"][0]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.05
    plain, _ = run_locally(config_of(tmp_path, tiny_llama, "uniform", run__id="two", model__quantization=quantization))
    assert apart(saved_adapter(folder), saved_adapter(plain)) > 1e-3
    other, _ = run_locally(
        config_of(tmp_path, tiny_llama, mine, run__id="three", model__quantization=quantization)
        if quantization == "none"
        else config_of(
            tmp_path, tiny_llama, mine, run__id="three", model__quantization=quantization, lora__init_options="size=2"
        )
    )
    same = quantization == "none"  # the same run twice, or another size
    assert (apart(saved_adapter(folder), saved_adapter(other)) <= run_bound(0.0)) is same


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(config_of(tmp_path, tiny_llama, mine))


@pytest.mark.parametrize(
    ("name", "keys", "error", "message"),
    [
        ("uniforn", {}, ConfigError, r"lora\.init: unknown initializer 'uniforn' .*did you mean 'uniform'"),
        ("no_such:Init", {}, ConfigError, r"lora\.init = 'no_such:Init': cannot import 'no_such'"),
        ("initializers_of_mine:MeanInput", {}, ConfigError, "MeanInput is no initializer; write a frozen dataclass"),
        ("lora-sb", {"lora__init_options": "step=1"}, ConfigError, "lora-sb has no option 'step'"),
        (
            "uniform",
            {"strategy__name": "fedsb"},
            StrategyError,
            r"lora\.init = uniform: this strategy needs factors .*set lora\.init = auto, or lora-sb or lora-xs",
        ),
        (
            "lora-xs",
            {"strategy__name": "frlora"},
            StrategyError,
            r"as pissa makes them; set lora\.init = auto, or pissa",
        ),
        ("lora-sb", {"strategy__name": "flora"}, StrategyError, r"does not keep; .*or use strategy\.name = fedsb"),
        (
            "lora-sb",
            {"strategy__name": "fedavg", "lora__ranks": "2", "lora__kind": "miss"},
            StrategyError,
            "does not keep|lora.kind = miss has none",
        ),
        ("initializers_of_mine:Spoiled", {}, (StrategyError, RunError), r"returned .*q_proj|shape|A \["),
    ],
)
def test_what_is_wrong_is_named(tmp_path, tiny_llama, mine, name, keys, error, message):
    with pytest.raises(error, match=message):
        run_locally(config_of(tmp_path, tiny_llama, name, **keys))
