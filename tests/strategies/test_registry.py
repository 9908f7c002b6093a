"""Strategies by name: options, errors, and a user's own class."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora.common.errors import StrategyError
from fedlora.strategies import load
from fedlora.strategies.base import Strategy
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.methods.hetlora import HetLora
from fedlora.strategies.methods.lora_fair import LoraFair
from fedlora.strategies.registry import NAMES, STRATEGIES

OWN = """
from dataclasses import dataclass
from typing import ClassVar
from fedlora.strategies.base import Strategy
from fedlora.strategies.methods.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    momentum: float = 0.9
    label: str = "x"
    def __post_init__(self):
        if self.momentum > 1:
            raise ValueError("momentum must be at most 1")

@dataclass(frozen=True)
class Half(Strategy):
    linear: ClassVar[bool] = True

class Plain: ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_strategies.py").write_text(OWN)
    (tmp_path / "broken_strategies.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_strategies"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_a_frozen_dataclass_with_defaults(name: str) -> None:
    strategy: Any = load(name)
    assert dataclasses.is_dataclass(type(strategy))
    assert type(strategy).__dataclass_params__.frozen
    assert isinstance(strategy.linear, bool)
    assert isinstance(strategy.unequal_ranks, bool)
    assert load(name) == strategy


def test_the_classes_fit_the_protocol() -> None:
    strategies: list[Strategy] = [FedAvg(), Flora(), LoraFair()]
    assert [type(load(name)) for name in ("fedavg", "flora", "lora-fair")] == [type(s) for s in strategies]


def test_options_are_set_and_checked() -> None:
    assert load("hetlora", prune_gamma=0.5) == HetLora(prune_gamma=0.5)
    assert load("lora-fair", similarity="cosine", lam=1) == LoraFair(similarity="cosine", lam=1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora_fair", {}, "unknown strategy 'lora_fair' .*; did you mean 'lora-fair'"),
        ("xyz", {}, r"your own is named package.module:Class.*; known are abmll, "),
        ("lora-fair", {"lambda_": 1.0}, "lora-fair has no option 'lambda_'; did you mean 'lam'"),
        ("fedavg", {"lam": 1.0}, "fedavg has no option 'lam'; it has no options"),
        ("lora-fair", {"lam": "big"}, "lam = 'big' is str, expected float"),
        ("lora-fair", {"lam": True}, "lam = True is bool, expected float"),
        ("lora-fair", {"lam": -1}, "lam = -1.0, expected a number of at least 0"),
        ("lora-fair", {"similarity": "cosin"}, "similarity = 'cosin'; did you mean 'cosine'"),
        ("fedsvd", {"period": 1.5}, "period = 1.5 is float, expected int"),
        ("flexlora", {"keep_tail": 1}, "keep_tail = 1 is int, expected bool"),
        ("no_such_package.module:X", {}, "cannot import 'no_such_package.module' .ModuleNotFoundError"),
        ("json:Nothing", {}, "module 'json' has no class 'Nothing'"),
        ("json:loads", {}, "loads is no strategy; write a frozen dataclass that extends"),
    ],
)
def test_errors_say_what_and_how_to_fix(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        load(name, **options)


def test_a_users_own_class(own: str) -> None:
    strategy = load(f"{own}:Mine", momentum=1, label=7)
    assert (type(strategy).__name__, vars(strategy)) == ("Mine", {"momentum": 1.0, "label": "7"})
    with pytest.raises(StrategyError, match=r"refuses .*momentum must be at most 1"):
        load(f"{own}:Mine", momentum=2.0)
    with pytest.raises(StrategyError, match="Half is no strategy"):
        load(f"{own}:Half")
    with pytest.raises(StrategyError, match="Plain is no strategy"):
        load(f"{own}:Plain")
    with pytest.raises(StrategyError, match=r"cannot import 'broken_strategies' .ZeroDivisionError: division by zero"):
        load("broken_strategies:X")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        (" , ", {}),
        ("similarity=cosine, lam=0.01", {"similarity": "cosine", "lam": 0.01}),
        ("lam = 1e-3", {"lam": 1e-3}),
        ("max-rank=64,compact=false", {"max_rank": 64, "compact": False}),
        ('label="a b"', {"label": "a b"}),
        ("path=a=b", {"path": "a=b"}),
        ("day=1979-05-27", {"day": "1979-05-27"}),
    ],
)
def test_parse_options(text: str, options: dict[str, Any]) -> None:
    assert STRATEGIES.parse(text) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "got 'cosine', expected name=value"),
        ("=1", "expected name=value"),
        ("lam=", "expected name=value"),
        ("lam=1, lam=2", "lam is given twice"),
    ],
)
def test_parse_options_refuses(text: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        STRATEGIES.parse(text)


def test_the_package_imports_without_torch() -> None:
    root = Path(__file__).parents[2]
    code = "import sys, fedlora.strategies.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_bare_folder_name_is_refused() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "import strategies"], cwd=root, capture_output=True, text=True, check=False
    )
    assert "import this folder as fedlora.strategies" in done.stderr
