"""A user's own rule of how a client's ranks are spread over the modules; both engines."""

from __future__ import annotations

import pytest

from fedlora.common.errors import ConfigError, RunError
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.server import saved_state
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module
from tests.simulations.engines.test_cohorts import apart
from tests.simulations.engines.test_local import saved_adapter

MINE = '''
from dataclasses import dataclass

from fedlora.strategies.allocations.base import Allocation


@dataclass(frozen=True)
class Deeper(Allocation):
    """Layers from `first` on get what the layers before them save."""

    first: int = 1
    low: int = 1

    def ranks(self, client, shapes, learned):
        deep = [name for name in shapes if int(name.split(".layers.")[1].split(".")[0]) >= self.first]
        numbers = lambda names: sum(client.rank_of(name) * sum(shapes[name]) for name in names)
        saved = sum((client.rank_of(n) - self.low) * sum(shapes[n]) for n in shapes if n not in deep)
        share = 1 + saved / numbers(deep)
        return {n: int(client.rank_of(n) * share) if n in deep else self.low for n in shapes}


@dataclass(frozen=True)
class Greedy(Allocation):
    def ranks(self, client, shapes, learned):
        return {name: client.rank_of(name) + 1 for name in shapes}


@dataclass(frozen=True)
class Forgetful(Allocation):
    def ranks(self, client, shapes, learned):
        return {}
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "ranks_of_mine", MINE) + ":Deeper"


@pytest.mark.parametrize("strategy", ["flora", "lora-fair", "flexlora", "fedsa", "hetlora", "fedsb"])
def test_each_client_trains_at_the_ranks_that_the_rule_gives_it(tmp_path, tiny_llama, mine, strategy):
    """The largest client, of rank 4, has 1 and 7 in its two layers; smaller ones get their own shares of that."""
    keys = {"train__lr": 2e-2, "train__steps": 6, "evaluate__clients": strategy == "fedsa"}
    folder, result = run_locally(tiny(tmp_path, tiny_llama, lora__allocation=mine, strategy__name=strategy, **keys))
    assert result["status"] == "completed"
    assert not result["rounds"][-1]["failures"]
    if strategy != "fedsa":  # which has no model without a client's own factors
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    found = saved_state.load(folder / "state", result["key"])
    assert found is not None
    ranks = {name: factors.rank for name, factors in found[0].adapter.lora.items()}
    assert {rank for name, rank in ranks.items() if ".layers.0." in name} == {1}
    assert {rank for name, rank in ranks.items() if ".layers.1." in name} == {7}


def test_a_client_that_joins_a_batch_keeps_its_own_ranks(tmp_path, tiny_llama, mine):
    alone, _ = run_locally(tiny(tmp_path, tiny_llama, lora__allocation=mine, run__id="one", train__clients_at_once="1"))
    together, _ = run_locally(
        tiny(tmp_path, tiny_llama, lora__allocation=mine, run__id="two", train__clients_at_once="auto")
    )
    assert apart(saved_adapter(alone), saved_adapter(together)) <= 1e-4


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(tiny(tmp_path, tiny_llama, lora__allocation=mine))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patern", "", r"lora\.allocation: unknown allocation of ranks 'patern'.*did you mean 'pattern'"),
        ("ranks_of_mine:Deeper", "depth=3", r"lora\.allocation-options: ranks_of_mine:Deeper has no option 'depth'"),
        ("ranks_of_mine:nothing", "", "module 'ranks_of_mine' has no class 'nothing'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, tiny_llama, mine, name, options, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(tiny(tmp_path, tiny_llama, lora__allocation=name, lora__allocation_options=options))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ranks_of_mine:Greedy",
            r"for client 0: its factors have [\d,]+ numbers, and the client affords [\d,]+, by its rank 4",
        ),
        ("ranks_of_mine:Forgetful", "Forgetful for client 0: expected a rank for each adapted module and no other"),
    ],
)
def test_a_rule_that_gives_no_ranks_or_too_much_is_refused(tmp_path, tiny_llama, mine, name, message):
    with pytest.raises(RunError, match=message):
        run_locally(tiny(tmp_path, tiny_llama, lora__allocation=name))
