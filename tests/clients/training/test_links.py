"""The warm-up of the learning rate begins anew with each adapter, where `train.warmup = link` asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from fedlora.clients.optimizers.base import Steps
from fedlora.clients.optimizers.standard import AdamW
from fedlora.clients.training.schedule import lr_factor, warmup_of
from fedlora.common.errors import StrategyError
from fedlora.config import TrainConfig
from fedlora.exchange import Plan
from fedlora.strategies.configured import configured
from tests.federation import run_locally, tiny

RATES: list[float] = []


class _Recorded(Steps):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def step(self, lr: float) -> None:
        RATES.append(lr)
        self.steps.step(lr)


@dataclass(frozen=True)
class Recording(AdamW):
    """AdamW that keeps the rates with which it was called."""

    shares_batch: ClassVar[bool] = True

    def begin(self, trained, config):
        return _Recorded(super().begin(trained, config))


def rates(folder, model, **keys):
    """The rates of each round's steps on the one client of a run of four rounds."""
    RATES.clear()
    config = tiny(
        folder,
        model,
        federation__clients=1,
        federation__rounds=4,
        train__steps=4,
        train__lr=1.0e-3,
        train__schedule="constant",
        train__optimizer=f"{__name__}:Recording",
        evaluate__server=False,
        **keys,
    )
    run_locally(config)
    return [[round(rate / 1e-3, 6) for rate in RATES[at : at + 4]] for at in range(0, 16, 4)]


UP, TOP = [0.5, 1.0, 1.0, 1.0], [1.0] * 4
SLOW = [[1 / 6, 1 / 3, 0.5, 2 / 3], [5 / 6, 1.0, 1.0, 1.0], TOP]
CASES = {
    "flora": ({"train__warmup": "link", "strategy__name": "flora"}, [UP] * 4),
    "florist": ({"train__warmup": "link", "strategy__name": "florist"}, [UP] * 4),
    "once": (
        {"train__warmup": "run", "strategy__name": "flora"},
        [[0.125, 0.25, 0.375, 0.5], [0.625, 0.75, 0.875, 1.0], TOP, TOP],
    ),
    "every-2": (
        {"train__warmup": "link", "strategy__name": "fedavg", "strategy__restart_every": 2, "lora__ranks": "2"},
        [[0.25, 0.5, 0.75, 1.0], TOP] * 2,
    ),
    "every-3": (
        {"train__warmup": "link", "strategy__name": "fedavg", "strategy__restart_every": 3, "lora__ranks": "2"},
        [*SLOW, SLOW[0]],
    ),
    "flora-inside": ({"train__warmup": "link", "strategy__name": "flora", "strategy__restart_every": 2}, [UP] * 4),
}


@pytest.mark.parametrize(("keys", "expected"), CASES.values(), ids=CASES)
def test_a_client_warms_up_anew_at_each_knot(tmp_path, tiny_llama, keys, expected):
    found = rates(tmp_path, tiny_llama, train__warmup_fraction=0.5, **keys)
    assert found == [pytest.approx(each, abs=1e-6) for each in expected]


def test_clients_in_one_batch_and_layers_drawn_have_it_too(tmp_path, tiny_llama):
    RATES.clear()
    config = tiny(
        tmp_path,
        tiny_llama,
        lora__ranks="1",
        strategy__name="flora",
        train__layers_per_round=1,
        train__clients_at_once="auto",
        train__warmup="link",
        train__warmup_fraction=0.9,
        train__schedule="constant",
        train__lr=1e-3,
        train__optimizer=f"{__name__}:Recording",
    )
    run_locally(config)
    expected = [1e-3 * at / 3 for _ in range(2) for at in (1, 2, 3) for _ in range(4)]
    assert pytest.approx(expected) == RATES


def test_the_schedule_still_falls_once_over_the_whole_run():
    config = TrainConfig(schedule="linear", warmup_fraction=0.5, warmup="link")
    plans = [Plan(begun=number, span=1) for number in (1, 2, 3)]
    found = [
        lr_factor(config, step, 12, warmup_of(config, plan, 4, 3))
        for round_, plan in enumerate(plans)
        for step in range(4 * round_, 4 * round_ + 4)
    ]
    fall = [1.0, 1.0, 1.0, *(1 - step / 10 for step in range(1, 10))]
    assert found == pytest.approx([f * r for f, r in zip(fall, [0.5, 1.0, 1.0, 1.0] * 3, strict=True)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_one_link_as_long_as_the_run_is_the_runs_own_warmup_to_the_bit(schedule):
    once = TrainConfig(schedule=schedule, warmup_fraction=0.15)
    links = replace(once, warmup="link")
    for step in range(100):
        plain = _before_links(once, step, 100)
        assert lr_factor(once, step, 100, warmup_of(once, Plan(begun=9, span=2), 5, 20)) == plain
        assert lr_factor(links, step, 100, warmup_of(links, Plan(), 5, 20)) == plain


def _before_links(config: TrainConfig, step: int, total: int) -> float:
    """The rate by two cases: a warm-up, then the schedule."""
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.schedule == "linear" else 1.0


def test_a_warmup_of_less_than_two_steps_is_refused(tmp_path, tiny_llama):
    short = tiny(tmp_path, tiny_llama, train__warmup="link", strategy__name="flora")
    with pytest.raises(
        StrategyError, match=r"an adapter is trained for 3 steps .* set train\.warmup-fraction to 0\.67"
    ):
        configured(short)
    configured(replace(short, train=replace(short.train, warmup_fraction=0.67)))
    configured(replace(short, train=replace(short.train, warmup="run")))
    one = replace(short, train=replace(short.train, steps=1, warmup_fraction=1.0))
    with pytest.raises(StrategyError, match=r"for 1 steps here .* set train\.steps to 2 or more"):
        configured(one)
