"""The wrappers that a config asks for, in their order, and runs with each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.common.errors import ConfigError, StrategyError
from fedlora.config import Scalar, parse
from fedlora.exchange import ClientInfo
from fedlora.strategies.configured import configured
from fedlora.strategies.methods.fedavg import FedAvg
from fedlora.strategies.methods.flexlora import FlexLora
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.wrappers.restart import Restart
from fedlora.strategies.wrappers.robust import Robust
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from tests.federation import run_locally, tiny


def made(**keys: Scalar) -> Any:
    return configured(parse({"strategy." + key.replace("_", "-"): value for key, value in keys.items()}))


def test_nothing_is_wrapped_by_default() -> None:
    assert made(name="fedavg") == FedAvg()
    assert made() == Flora()


def test_wrappers_are_stacked_in_order_with_their_options() -> None:
    keys: dict[str, Scalar] = {
        "strategy.name": "fedavg",
        "strategy.server-optimizer": "yogi",
        "strategy.server-lr": 0.02,
        "strategy.server-beta1": 0.5,
        "strategy.server-beta2": 0.9,
        "strategy.server-tau": 0.1,
        "strategy.restart-every": 3,
        "strategy.robust": "multi-krum",
        "strategy.robust-bound": 3.0,
        "strategy.robust-trim": 0.1,
        "strategy.robust-byzantine": 2,
        "strategy.robust-keep": 4,
    }
    optimizer = ServerOptimizer(FedAvg(), kind="yogi", lr=0.02, beta1=0.5, beta2=0.9, tau=0.1)
    chain = Restart(optimizer, every=3)
    assert configured(parse(keys)) == Robust(chain, rule="multi-krum", bound=3.0, trim=0.1, byzantine=2, keep=4)


def test_defaults_are_the_classes_own() -> None:
    assert made(name="fedavg", server_optimizer="adam") == ServerOptimizer(FedAvg(), kind="adam")
    assert made(name="fedavg", restart_every=1) == Restart(FedAvg())
    assert made(robust="median") == Robust(Flora(), rule="median")
    tail = made(name="flexlora", options="keep_tail=true", restart_every=1)
    assert tail == Restart(FlexLora(keep_tail=True))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"server_optimizer": "adam"}, "Flora does not keep rows of A"),
        ({"name": "fedsa", "restart_every": 1}, "FedSa leaves B on the clients"),
        ({"name": "fedsa", "robust": "krum"}, "FedSa leaves B on the clients"),
        ({"name": "fedavg", "server_optimizer": "adam", "server_lr": 0.0}, r"strategy\.server-lr = 0\.0"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Scalar], says: str) -> None:
    with pytest.raises(StrategyError, match=says):
        made(**keys)


def test_a_penalty_on_updates_needs_factors() -> None:
    keys: dict[str, Scalar] = {"strategy.name": "fedavg", "train.prox-of": "update", "lora.kind": "miss"}
    configured(parse(keys))  # without a weight there is no penalty
    with pytest.raises(StrategyError, match=r"train.prox-of = update: lora.kind = miss has no factors A and B"):
        configured(parse({**keys, "train.prox-mu": 0.1}))
    configured(parse({**keys, "train.prox-mu": 0.1, "lora.kind": "lora"}))


@pytest.mark.parametrize(
    ("key", "value"), [("server-optimizer", "adamw"), ("robust", "krumm"), ("robust-trim", 0.5), ("server-beta1", 1.0)]
)
def test_a_bad_value_is_named(key: str, value: Scalar) -> None:
    with pytest.raises(ConfigError, match=f"strategy.{key} = "):
        parse({f"strategy.{key}": value})


def test_clients_are_checked_through_all_layers() -> None:
    strategy = made(name="rolora", server_optimizer="momentum", restart_every=3, robust="krum")
    with pytest.raises(StrategyError, match="round 4 starts from B = 0"):
        strategy.check([ClientInfo(client_id=i, rank=2) for i in range(5)])
    strategy = made(name="rolora", server_optimizer="momentum", restart_every=2, robust="krum")
    with pytest.raises(StrategyError, match=r"the run: .* needs 5 clients, got 4"):
        strategy.check([ClientInfo(client_id=i, rank=2) for i in range(4)])


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__name": "lora-fair", "strategy__server_optimizer": "adam", "strategy__server_lr": 0.01},
        {"strategy__name": "flexlora", "strategy__restart_every": 2},
        {"strategy__name": "flora", "strategy__robust": "norm-bound"},
        {
            "strategy__name": "rolora",
            "strategy__server_optimizer": "momentum",
            "strategy__server_beta1": 0.5,
            "strategy__restart_every": 2,
            "strategy__robust": "multi-krum",
            "strategy__robust_byzantine": 0,
        },
    ],
    ids=["optimizer", "restart", "robust", "all"],
)
def test_a_run_learns(keys: dict[str, Scalar], tmp_path: Path, tiny_llama: Path) -> None:
    config = tiny(tmp_path, tiny_llama, federation__rounds=3, train__lr=0.02, **keys)
    folder, result = run_locally(config)
    assert result["status"] == "completed"
    losses = [entry["heldout"]["loss"] for entry in result["rounds"]]
    assert min(losses) < result["baseline"]["loss"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
