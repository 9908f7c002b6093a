"""Ranks that grow with the layer, within each client's budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import ConfigError
from fedlora.config import LoraConfig
from fedlora.exchange import ClientInfo
from fedlora.strategies.allocations.prilora import PriLora
from fedlora.strategies.allocations.registry import Ranks
from fedlora.strategies.server import saved_state
from tests.federation import run_locally, tiny

SHAPES = {f"model.layers.{n}.{m}": s for n in range(9) for m, s in {"q": (8, 8), "up": (24, 8)}.items()}


def test_the_papers_ranks_go_from_4_to_12():
    ranks = PriLora().ranks(ClientInfo(client_id=0, rank=8), SHAPES | {"lm_head": (30, 8)}, {})
    assert [ranks[f"model.layers.{n}.q"] for n in range(9)] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert all(ranks[f"model.layers.{n}.q"] == ranks[f"model.layers.{n}.up"] for n in range(9))
    assert ranks["lm_head"] == 8
    assert PriLora().ranks(ClientInfo(client_id=0, rank=8), {"h.0.q": (8, 8)}, {}) == {"h.0.q": 8}


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 40), ratio=st.floats(1, 60), layers=st.integers(1, 12))
def test_every_client_stays_within_its_budget(rank: int, ratio: float, layers: int) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if int(name.split(".")[2]) < layers}
    lora = LoraConfig(allocation="prilora", allocation_options=f"ratio={ratio}")
    client = Ranks.of(lora, shapes).give(
        ClientInfo(client_id=3, rank=rank, rank_pattern={"up": 2})
    )  # checks the budget
    for module in ("q", "up"):
        grown = [client.rank_of(f"model.layers.{n}.{module}") for n in range(layers)]
        assert min(grown) >= 1
    assert client.scaling_of("model.layers.0.q") == 2.0


def test_a_federation_of_unequal_clients_learns(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, lora__allocation="prilora", train__lr=2e-2, train__steps=6)
    _, result = run_locally(config)
    assert not result["rounds"][-1]["failures"]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


def test_a_ratio_below_1_is_refused():
    with pytest.raises(ConfigError, match=r"prilora's ratio = 0\.5, expected a number of at least 1"):
        PriLora(ratio=0.5)


@pytest.mark.parametrize(("strategy", "quantization"), [("fedavg-zeropad", "none"), ("flora", "nf4")])
def test_the_least_important_entries_of_each_row_of_a_are_zero_after_a_round(
    tmp_path, tiny_llama, strategy, quantization
):
    config = tiny(
        tmp_path,
        tiny_llama,
        lora__allocation="prilora",
        lora__allocation_options="prune=0.5",
        strategy__name=strategy,
        model__quantization=quantization,
        train__lr=2e-2,
        train__steps=6,
    )
    folder, result = run_locally(config)
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    found = saved_state.load(folder / "state", result["key"])
    sizes = saved_state.load_learned(folder / "state", result["key"])
    assert found is not None
    assert sizes
    for name, f in found[0].adapter.lora.items():
        assert set((f.A == 0).sum(dim=1).tolist()) == {f.A.shape[1] // 2}
        if strategy != "flora":  # whose A is drawn anew, and pruned as it stands
            kept = (f.A.abs() * sizes[name])[f.A != 0].reshape(f.rank, -1)
            assert float(kept.min()) > 0
    with pytest.raises(ConfigError, match=r"prilora's prune = 1\.0, expected 0 or more, below 1"):
        PriLora(prune=1.0)


def test_pruning_goes_by_the_size_of_the_inputs():
    factors = LoraFactors(A=torch.tensor([[1.0, -3.0, 2.0, 0.5]]), B=torch.ones(2, 1), scaling=1.0)
    pruned = PriLora(prune=0.5).after_round(
        AdapterState(lora={"q": factors, "v": factors}), {"q": torch.tensor([9.0, 0.1, 1.0, 1.0])}
    )
    assert pruned.lora["q"].A.tolist() == [[1.0, 0.0, 2.0, 0.0]]
    assert pruned.lora["v"].A.tolist() == factors.A.tolist()
