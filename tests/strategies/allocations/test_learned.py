"""Rules for ranks that learn from what clients measure in a round 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters import AdapterState, count_numbers
from fedlora.clients.statistics.dimension import two_nn
from fedlora.common.errors import ConfigError, RunError, StrategyError
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies.allocations.eva import EvaRanks
from fedlora.strategies.allocations.gelora import GeLora
from fedlora.strategies.allocations.selection import Diffora, Flexora
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.server import saved_state
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

LEARNING = ["colora", "diffora", "dynamic", "eva", "flexora", "gelora"]
KEYS = {"train__lr": 2e-2, "train__steps": 6, "data__max_length": 32}


def state_of(folder: Path, result: dict) -> AdapterState:
    found = saved_state.load(folder / "state", result["key"])
    assert found is not None
    return found[0].adapter


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize(
    ("strategy", "quantization"),
    [
        ("flora", "nf4"),
        pytest.param("fedavg-zeropad", "none", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_a_federation_of_unequal_clients_learns_at_the_ranks_that_were_found(
    tmp_path, tiny_llama, name, strategy, quantization
):
    config = tiny(
        tmp_path,
        tiny_llama,
        lora__allocation=name,
        strategy__name=strategy,
        model__quantization=quantization,
        **KEYS,
    )
    folder, result = run_locally(config)
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert not any(entry["failures"] for entry in result["rounds"])
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    lora = state_of(folder, result).lora
    shapes = {module: (f.B.shape[0], f.A.shape[1]) for module, f in lora.items()}
    ranks = {module: f.rank for module, f in lora.items()}
    assert count_numbers(ranks, shapes) <= count_numbers(dict.fromkeys(shapes, 4), shapes)
    if name in ("eva", "dynamic", "colora"):
        assert len(set(ranks.values())) > 1


def test_what_was_learned_is_kept_for_this_run_alone(tmp_path):
    learned = {"a": torch.tensor([1.0, 2.0])}
    assert saved_state.load_learned(tmp_path, "mine") is None
    saved_state.save_learned(tmp_path, learned, "mine")
    found = saved_state.load_learned(tmp_path, "mine")
    assert found is not None
    assert torch.equal(found["a"], learned["a"])
    with pytest.raises(RunError, match="it is of another run"):
        saved_state.load_learned(tmp_path, "another")


def test_eva_and_its_ranks_share_a_round(tmp_path, tiny_llama):
    keys = {"lora__ranks": "", "lora__rank": 3, "strategy__name": "fedavg", **KEYS}
    folder, result = run_locally(tiny(tmp_path, tiny_llama, lora__init="eva", lora__allocation="eva", **keys))
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    plain, _ = run_locally(tiny(tmp_path, tiny_llama, run__id="two", lora__allocation="eva", **keys))
    assert apart(saved_adapter(folder), saved_adapter(plain)) > 1e-3


def test_a_round_of_few_layers_may_have_ranks_above_the_clients_own(tmp_path, tiny_llama):
    """The budget is that of all modules, of which a round may send those alone that have more than their share."""
    keys = {"strategy__name": "flora", "lora__allocation": "eva", "train__layers_per_round": 1, **KEYS}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **keys))
    assert not any(entry["failures"] for entry in result["rounds"])


def test_what_cannot_be_is_refused_before_the_run(tmp_path, tiny_llama):
    with pytest.raises(
        StrategyError, match=r"lora\.allocation = gelora asks .*dimensions, and lora\.init = eva for anoth"
    ):
        check_ranks(tiny(tmp_path, tiny_llama, lora__init="eva", lora__allocation="gelora", strategy__name="flora"))
    with pytest.raises(StrategyError, match=r"measured beside LoRA's A and B, and lora\.kind = miss has none"):
        check_ranks(
            tiny(
                tmp_path, tiny_llama, lora__kind="miss", lora__ranks="", lora__allocation="eva", strategy__name="fedavg"
            )
        )
    keys = {"lora__ranks": "", "strategy__name": "fedavg", "lora__allocation": "dynamic"}
    with pytest.raises(StrategyError, match=r"lora\.allocation = dynamic asks .*strategy\.robust cannot compare"):
        check_ranks(tiny(tmp_path, tiny_llama, strategy__robust="median", **keys))
    with pytest.raises(ConfigError, match=r"diffora's keep = 0\.0, expected above 0 and at most 1"):
        Diffora(keep=0.0)


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_two_nn_finds_the_dimension_of_a_plane(dimension):
    g = torch.Generator().manual_seed(dimension)
    points = torch.randn(2000, dimension, generator=g) @ torch.randn(dimension, 40, generator=g)
    assert two_nn(points) == pytest.approx(dimension, rel=0.12)
    assert two_nn(points[:2]) == 0.0
    assert two_nn(torch.ones(50, 3)) == 0.0


def update(client: int, tensors: dict[str, list[float]], examples: int = 1) -> ClientUpdate:
    return ClientUpdate(client, AdapterState(tensors={n: torch.tensor(t) for n, t in tensors.items()}), examples)


def test_gelora_takes_the_growth_of_the_weighted_median():
    sent = [
        update(0, {"h.0.dimensions": [2.0, 5.2], "h.1.dimensions": [5.2, 4.0]}),
        update(1, {"h.0.dimensions": [2.0, 9.0], "h.1.dimensions": [9.0, 4.0]}),
        update(2, {"h.0.dimensions": [1.0, 5.0], "h.1.dimensions": [5.0, 7.0]}, examples=3),
    ]
    learned = GeLora().learn(sent)
    assert {block: pair.tolist() for block, pair in learned.items()} == {"h.0": [1.0, 5.0], "h.1": [5.0, 7.0]}
    shapes = {"h.0.q": (8, 8), "h.1.q": (8, 8), "head": (4, 8)}
    assert GeLora().ranks(ClientInfo(client_id=0, rank=8), shapes, learned) == {"h.0.q": 5, "h.1.q": 3, "head": 8}
    assert GeLora().ranks(ClientInfo(client_id=0, rank=2), shapes, learned) == {"h.0.q": 2, "h.1.q": 2, "head": 2}


def test_evas_ranks_are_the_largest_shares():
    learned = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    shapes = {"a": (8, 8), "b": (8, 8)}
    assert EvaRanks().ranks(ClientInfo(client_id=0, rank=2), shapes, learned) == {"a": 1, "b": 3}
    assert EvaRanks(growth=1.0).ranks(ClientInfo(client_id=0, rank=2), shapes, learned) == {"a": 2, "b": 2}


def test_only_chosen_layers_are_trained_and_sent():
    shapes = {f"h.{n}.{m}": (4, 4) for n in range(3) for m in "qv"}
    alpha = {"h.0": torch.tensor([0.3]), "h.1": torch.tensor([-0.1]), "h.2": torch.tensor([-0.2])}
    assert Flexora().modules(shapes, alpha) == {"h.0.q", "h.0.v"}
    assert Flexora().modules(shapes, {n: -t.abs() for n, t in alpha.items()}) == {"h.1.q", "h.1.v"}
    assert Flexora().modules(shapes, {}) is None
    each = {module: torch.tensor([float(i)]) for i, module in enumerate(shapes)}
    assert Diffora(keep=0.3).modules(shapes, each) == {"h.2.q", "h.2.v"}
