"""Every registered strategy end to end: an nf4 base, unequal ranks where allowed, clients that skip rounds."""

from __future__ import annotations

import math

import pytest

from fedlora.common.errors import StrategyError
from fedlora.strategies import load
from fedlora.strategies.registry import NAMES
from tests.federation import run_locally, tiny


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_a_quantized_base_and_lowers_the_loss(tmp_path, tiny_llama, name):
    strategy = load(name)
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name=name,
        model__quantization="nf4",
        lora__ranks="4,2,2,1" if strategy.unequal_ranks else "3",
        federation__rounds=3,
        federation__fraction=0.75,
        train__steps=6,
        train__lr=2e-2,
        train__schedule="constant",
        evaluate__clients=bool(strategy.personal),
        data__client_test_fraction=0.2,
    )
    folder, result = run_locally(config)
    assert result["status"] == "completed"
    rounds = [entry for entry in result["rounds"] if entry["round"]]
    assert [(len(entry["clients"]), entry["failures"]) for entry in rounds] == [(3, {})] * 3
    if strategy.personal:
        losses = [entry["client-test"]["mean"]["loss"] for entry in rounds]
    else:
        losses = [result["baseline"]["loss"], *(entry["heldout"]["loss"] for entry in rounds)]
        for entry in rounds:
            assert math.isfinite(entry["aggregation-error"])
            assert 0 <= entry["drift"] <= 1
            assert 0 <= entry["tail-energy"] <= 1
            assert entry["effective-rank"] >= 1
            assert len(entry["norms"]) == 6
    assert losses[-1] < losses[0] - 0.05
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if not load(name).unequal_ranks])
def test_unequal_ranks_are_refused_before_the_run_where_they_cannot_be_served(tmp_path, tiny_llama, name):
    with pytest.raises(StrategyError, match=r"needs one rank, got ranks 4, 2, 2, 1; .*or use strategy\.name"):
        run_locally(tiny(tmp_path, tiny_llama, strategy__name=name, lora__ranks="4,2,2,1"))


def test_hetlora_prunes_clients_to_smaller_ranks(tmp_path, tiny_llama):
    """The penalty shrinks the last rows until they go, and the upload shrinks with them."""
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="hetlora",
        strategy__options="prune-gamma=0.5, prune-weight=10.0",
        federation__rounds=4,
        train__steps=6,
        train__lr=2e-2,
    )
    _, result = run_locally(config)
    bytes_up = [entry["upload-bytes"] for entry in result["rounds"]]
    assert bytes_up[-1] < 0.9 * bytes_up[0]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
