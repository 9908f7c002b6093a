"""A layer rule of a user's own: a strategy that narrows each round's plan to some modules; both engines."""

from __future__ import annotations

import pytest
import torch

from fedlora.strategies.schedules import session
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module

MINE = '''
import random
from dataclasses import dataclass, replace

from fedlora.strategies.methods.fedavg_zeropad import FedAvgZeropad


@dataclass(frozen=True)
class Sampled(FedAvgZeropad):
    """Some modules a round, the same for all clients; the others are neither trained nor sent."""

    share: float = 0.5

    def broadcast(self, state, client, number):
        sent = super().broadcast(state, client, number)
        names = sorted(sent.adapter.lora)
        chosen = random.Random(f"{state.seed}/{number}").sample(names, max(1, round_down(self.share * len(names))))
        return replace(sent, plan=replace(sent.plan, modules=frozenset(chosen)))


def round_down(number):
    return int(number)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "layers_of_mine", MINE) + ":Sampled"


@pytest.mark.parametrize("at_once", ["1", "auto"])
@pytest.mark.parametrize("upload", ["fp32", "int8"])
def test_modules_outside_the_plan_stay_where_they_are_and_are_not_sent(
    tmp_path, tiny_llama, monkeypatch, mine, at_once, upload
):
    states = []
    aggregate = session.Session._aggregate
    monkeypatch.setattr(
        session.Session,
        "_aggregate",
        lambda self, state, *rest: states.append((state, aggregate(self, state, *rest))) or states[-1][1],
    )
    keys = {"train__clients_at_once": at_once, "wire__upload_dtype": upload, "train__lr": 2e-2}
    _, result = run_locally(tiny(tmp_path, tiny_llama, strategy__name=mine, **keys))
    for before, after in states:
        moved = [n for n, f in after.adapter.lora.items() if not torch.equal(f.B, before.adapter.lora[n].B)]
        assert len(moved) == 3
        assert all(torch.equal(after.adapter.lora[n].B, f.B) for n, f in before.adapter.lora.items() if n not in moved)
    _, whole = run_locally(
        tiny(tmp_path, tiny_llama, strategy__name=mine, strategy__options="share=1", run__id="whole", **keys)
    )
    assert 0.3 < result["rounds"][0]["upload-bytes"] / whole["rounds"][0]["upload-bytes"] < 0.8
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(tiny(tmp_path, tiny_llama, strategy__name=mine))
