"""Whole federations with each optimizer: they learn, go on after a stop, and say what they cannot do."""

from __future__ import annotations

import pytest

from fedlora.clients.optimizers.registry import OPTIMIZERS
from fedlora.common.errors import ConfigError
from fedlora.common.events import listen
from fedlora.common.once import say_once
from fedlora.config import Config, parse
from fedlora.simulations import run as simulation
from tests.device import assert_same, run_bound
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

RATES = {
    "lora-plus": 2e-3,
    "lora-rite": 5e-3,
    "lora-pro": 5e-3,
    "riemannian": 5e-3,
    "allora": 1e-2,
    "sam": 1e-2,
    "glad": 1e-2,
}


def config_of(folder, model, name: str, **keys) -> Config:
    return tiny(
        folder,
        model,
        **{"train__optimizer": name, "train__lr": RATES[name], "train__steps": 4, "lora__ranks": "2", **keys},
    )


def test_every_optimizer_of_pairs_or_passes_is_run_here():
    assert set(RATES) == {name for name in OPTIMIZERS.names if not name.endswith(("adamw", "-8bit", "sgd"))}


SETTINGS = [
    ("nf4", "flora"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (("nf4", "fedavg"), ("none", "flora"), ("none", "fedavg"))
    ),
]


@pytest.mark.parametrize(("quantization", "strategy"), SETTINGS)
@pytest.mark.parametrize("name", sorted(RATES))
def test_a_federation_learns_alone_and_in_company(tmp_path, tiny_llama, name, quantization, strategy, sizes):
    keys = {"strategy__name": strategy, "model__quantization": quantization}
    if strategy == "flora":
        keys["lora__ranks"] = "4,2,2,1"
    adapters = []
    for at_once in ("1", "4"):
        config = config_of(
            tmp_path, tiny_llama, name, train__clients_at_once=at_once, run__id=f"at-once-{at_once}", **keys
        )
        folder, result = run_locally(config)
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.02
        assert all(entry["failures"] == {} for entry in result["rounds"])
        adapters.append(saved_adapter(folder))
    assert apart(*adapters) <= run_bound(1e-3)
    assert sizes == [4, 4], "one batch in each round of the second run"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("lora-rite", "sam") else pytest.mark.slow) for name in sorted(RATES)],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, tiny_llama, name):
    """No state of an optimizer outlives a round."""
    whole, _ = run_locally(config_of(tmp_path, tiny_llama, name, run__id="whole"))
    config = config_of(tmp_path, tiny_llama, name, run__id="stopped")

    class Stopped(Exception):
        pass

    def stop(kind, facts):
        if kind == "round-start" and facts["round"] == 2:
            raise Stopped

    with listen(stop), pytest.raises(Stopped):
        simulation.in_process(config)
    folder, _ = run_locally(parse({"run.resume": True}, config))
    assert_same(saved_adapter(folder), saved_adapter(whole))


def test_where_no_pair_is_trained_it_is_said_once(tmp_path, tiny_llama, caplog):
    say_once.cache_clear()
    keys = {"strategy__name": "ffa", "lora__ranks": "2"}
    ours, _ = run_locally(config_of(tmp_path, tiny_llama, "lora-rite", run__id="rite", **keys))
    plain, _ = run_locally(tiny(tmp_path, tiny_llama, train__lr=RATES["lora-rite"], train__steps=4, **keys))
    assert_same(saved_adapter(ours), saved_adapter(plain))
    said = [r.message for r in caplog.records if "here are none" in r.message]
    assert len(said) == 1
    assert said[0].startswith("train.optimizer = lora-rite ")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora-plus", "ratio=-1", "lora-plus's ratio = -1, expected a number above 0"),
        ("lora-rite", "beta1=2", "lora-rite's beta1 = 2, expected a number from 0 to below 1"),
        ("lora-pro", "base=adam", "lora-pro's base = 'adam'"),
        ("riemannian", "delta=0", "riemannian's delta = 0, expected a number above 0"),
        ("allora", "eta=-2", "allora's eta = -2, expected a number above 0"),
        ("sam", "rho=-1", "sam's rho = -1, expected a number of at least 0"),
        ("glad", "radius=1", "glad has no option 'radius'"),
    ],
)
def test_a_wrong_option_is_named_before_the_run(tmp_path, tiny_llama, name, options, says):
    with pytest.raises(ConfigError, match=f"train.optimizer-options: {says}"):
        run_locally(config_of(tmp_path, tiny_llama, name, train__optimizer_options=options))
    assert not (tmp_path / "runs").exists()
