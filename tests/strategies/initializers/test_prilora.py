"""Ranks that grow with the layer, within each client's budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import ConfigError
from fedlora.config import LoraConfig
from fedlora.exchange import ClientInfo
from fedlora.strategies.initializers.prilora import PriLora
from fedlora.strategies.initializers.ranks import allocator
from tests.federation import run_locally, tiny

SHAPES = {f"model.layers.{n}.{m}": s for n in range(9) for m, s in {"q": (8, 8), "up": (24, 8)}.items()}


def test_the_papers_ranks_go_from_4_to_12():
    ranks = PriLora().ranks(ClientInfo(client_id=0, rank=8), SHAPES | {"lm_head": (30, 8)})
    assert [ranks[f"model.layers.{n}.q"] for n in range(9)] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert all(ranks[f"model.layers.{n}.q"] == ranks[f"model.layers.{n}.up"] for n in range(9))
    assert ranks["lm_head"] == 8
    assert PriLora().ranks(ClientInfo(client_id=0, rank=8), {"h.0.q": (8, 8)}) == {"h.0.q": 8}


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 40), ratio=st.floats(1, 60), layers=st.integers(1, 12))
def test_every_client_stays_within_its_budget(rank: int, ratio: float, layers: int) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if int(name.split(".")[2]) < layers}
    lora = LoraConfig(allocation="prilora", allocation_options=f"ratio={ratio}")
    client = allocator(lora, shapes)(ClientInfo(client_id=3, rank=rank, rank_pattern={"up": 2}))  # checks the budget
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
