"""An adapter kind of a user's own, and MiSS: federations end to end, alone and as one batch, on both engines."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import flower
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.plugins.module import write_module
from tests.simulations.engines.test_cohorts import apart

MINE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.adapters import LoraFactors
from fedlora.adapters.kinds.base import AdapterKind


@dataclass(frozen=True)
class Output(AdapterKind):
    """One trained number for each output, times the mean of the inputs."""

    gain: float = 1.0

    name: ClassVar[str] = "output"
    linear: ClassVar[bool] = True

    def shapes(self, place):
        return {"d": (place.d_out,)}

    def rank(self, parts):
        return 1

    def forward(self, x, parts, constants, place):
        return self.gain * x.mean(dim=-1, keepdim=True) * parts["d"]

    def factors(self, parts, constants, place):
        A = torch.full((1, place.d_in), self.gain / place.d_in)
        return LoraFactors(A=A.to(parts["d"]), B=parts["d"][:, None], scaling=1.0)
'''


def config_of(folder, model, kind: str, **keys):
    common = {"lora__ranks": "", "lora__rank": 4, "strategy__name": "fedavg", "lora__kind": kind}
    return tiny(folder, model, **common, train__lr=5e-2, train__steps=6, train__schedule="constant", **keys)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "kinds_of_mine", MINE) + ":Output"


@pytest.mark.parametrize(
    "kind", ["miss", "randlora", "vera", "beamlora", "block-lora", "lora-xs", "loldu", "dora", "glora", "ravan", "mine"]
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("keys", [{}, {"strategy__server_optimizer": "momentum", "strategy__server_beta1": 0.0}])
def test_a_federation_learns_and_clients_at_once_are_clients_alone(
    tmp_path, tiny_llama, mine, kind, quantization, keys
):
    name = mine if kind == "mine" else kind
    results = []
    for at_once in ("1", "auto"):
        config = config_of(
            tmp_path,
            tiny_llama,
            name,
            run__id=f"run-{at_once}",
            train__clients_at_once=at_once,
            model__quantization=quantization,
            lora__dropout=0.1,
            **keys,
        )
        folder, result = run_locally(config)
        assert [len(entry["clients"]) for entry in result["rounds"]] == [4, 4]
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.05
        results.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    alone, together = results
    assert apart(alone, together) <= run_bound(2e-3)


def test_the_options_reach_the_kind(tmp_path, tiny_llama, mine):
    one, two = (
        run_locally(config_of(tmp_path, tiny_llama, mine, run__id=f"gain-{gain}", lora__kind_options=f"gain={gain}"))[1]
        for gain in (1, 3)
    )
    assert one["rounds"][-1]["heldout"]["loss"] != two["rounds"][-1]["heldout"]["loss"]


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    config = config_of(tmp_path, tiny_llama, mine)
    _, here = run_locally(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    there = json.loads((folder_of(other) / "result.json").read_text(encoding="utf-8"))
    losses = [[entry["heldout"]["loss"] for entry in result["rounds"]] for result in (here, there)]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy__name": "flora"}, r"lora\.kind = miss has no factors A and B.*strategy\.name = .*fedavg"),
        ({"strategy__restart_every": 1}, r"lora\.kind = miss has no factors A and B"),
        (
            {"lora__ranks": "4,2", "strategy__name": "fedavg-zeropad"},
            r"lora\.kind = miss needs one rank, got ranks 4, 2, 4, 2; set lora\.ranks = '' and lora\.rank = 4",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_before_the_run(tmp_path, tiny_llama, keys, message):
    with pytest.raises(StrategyError, match=message):
        run_locally(
            config_of(tmp_path, tiny_llama, "miss")
            if not keys
            else parse(
                {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()},
                config_of(tmp_path, tiny_llama, "miss"),
            )
        )
