"""Whole runs in which clients send sketches of their updates, and the server needs only their sum."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import RunError, StrategyError
from fedlora.config import Config, Scalar, parse
from fedlora.exchange import ClientUpdate
from fedlora.exchange.stages import Stage
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from fedlora.strategies.configured import configured
from fedlora.strategies.registry import NAMES, STRATEGIES
from tests.device import assert_same, run_bound
from tests.federation import run_locally, tensors_of, tiny
from tests.simulations.engines import test_lost_messages as lost
from tests.simulations.engines.test_hosted import played
from tests.simulations.engines.test_local import apart, saved_adapter
from tests.simulations.test_resume import amid_round, die, forget, go_on
from tests.tiny import save_llama

pytestmark = pytest.mark.usefixtures("fresh_process")
WIDTH = 9  # 4 + 2 + 2 + 1


@dataclass(frozen=True)
class Clipping(Stage):
    """Changes replies where they arrive."""

    def arriving(self, updates: Iterable[ClientUpdate], number: int) -> Iterator[ClientUpdate]:
        yield from updates


VARIANTS = [
    ("flora", ""),
    ("flexlora", ""),
    ("flexlora", "keep_tail=true"),
    ("flexlora", "fold_tail=true"),
    ("florist", ""),
    ("fedex", ""),
    ("lora-fair", ""),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose modules are larger than their sketches, so that these are sent."""
    return save_llama(tmp_path_factory.mktemp("wide"), hidden_size=96, intermediate_size=128)


def sketching(folder: Path, model: Path, passes: int = 1, width: int = WIDTH, **keys: Scalar) -> Config:
    about: dict[str, Scalar] = {"wire__sum": "sketch", "wire__sketch_width": width, "wire__sketch_passes": passes}
    return tiny(folder, model, **{"strategy__name": "lora-fair", **about, **keys})


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_run_from_sums_learns_what_one_from_factors_learns(tmp_path, wide, name, options):
    """SGD, since Adam makes of a gradient's last digits a step of full length."""
    keys: dict[str, Scalar] = {
        "strategy__name": name,
        "strategy__options": options,
        "train__optimizer": "sgd",
        "train__lr": 0.5,
    }
    plain, before = run_locally(tiny(tmp_path, wide, run__id="plain", **keys))
    for passes in (1, 2):
        summed, after = run_locally(sketching(tmp_path, wide, passes, run__id=str(passes), **keys))
        assert apart(saved_adapter(plain), saved_adapter(summed)) <= run_bound(1e-5)
        for one, two in zip(before["rounds"], after["rounds"], strict=True):
            assert two["heldout"]["loss"] == pytest.approx(one["heldout"]["loss"], abs=run_bound(1e-5))
            assert 0 <= two["sketch-loss"] < run_bound(1e-5)
            assert one["sketch-loss"] is None
            weights = [{k: v["weight"] for k, v in entry["clients"].items()} for entry in (one, two)]
            assert weights[0] == weights[1]
            # of single updates the server knows nothing
            assert all(two[key] is None for key in ("drift", "update-cosine"))
            assert two["failures"] == {}
        assert not (summed / "waiting").exists()
    assert before["rounds"][-1]["heldout"]["loss"] < before["baseline"]["loss"] - 0.01


def test_below_the_sum_of_the_ranks_the_record_states_a_loss_and_two_passes_lose_less(tmp_path, wide):
    losses = {}
    for passes in (1, 2):
        _, result = run_locally(sketching(tmp_path, wide, passes, width=4, run__id=str(passes), strategy__name="flora"))
        losses[passes] = [entry["sketch-loss"] for entry in result["rounds"]]
    assert 0.01 < losses[2][0] < losses[1][0] < 2


def test_a_model_smaller_than_its_sketches_sends_what_it_is(tmp_path, tiny_llama):
    """Nothing is lost, and nobody is asked twice, whatever was configured."""
    plain, _ = run_locally(tiny(tmp_path, tiny_llama, run__id="plain", strategy__name="flora"))
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message:
        asked.append(message.metadata.message_type)
        return client_app(message, context)

    config = sketching(tmp_path, tiny_llama, passes=2, width=64, strategy__name="flora")
    simulation.in_process(config, client_app=watching(answer))
    assert apart(saved_adapter(plain), saved_adapter(folder_of(config))) <= run_bound(1e-4)
    assert asked
    assert "train.project" not in asked
    assert [entry["sketch-loss"] for entry in result_of(config)["rounds"]] == [0.0, 0.0]


def watching(answer: Any) -> ClientApp:
    app = ClientApp()
    for register in (app.query(), app.train(), app.train("project"), app.evaluate()):
        register(answer)
    return app


def result_of(config: Config) -> dict[str, Any]:
    return json.loads((folder_of(config) / "result.json").read_text(encoding="utf-8"))


def test_linear_strategies_go_on_as_before(tmp_path, tiny_llama):
    plain, _ = run_locally(tiny(tmp_path, tiny_llama, run__id="plain", lora__ranks="2", strategy__name="fedavg"))
    summed, result = run_locally(sketching(tmp_path, tiny_llama, lora__ranks="2", strategy__name="fedavg"))
    assert_same(saved_adapter(plain), saved_adapter(summed))
    assert result["rounds"][0]["sketch-loss"] is None


@pytest.mark.parametrize("passes", [1, 2])
def test_clients_of_one_batch_and_of_one_node_and_a_coarse_broadcast(tmp_path, wide, passes):
    alone, _ = run_locally(sketching(tmp_path, wide, passes, run__id="alone"))
    batch, _ = run_locally(sketching(tmp_path, wide, passes, run__id="batch", train__clients_at_once="4"))
    assert apart(saved_adapter(alone), saved_adapter(batch)) <= run_bound(1e-4)
    coarse: dict[str, Scalar] = {"wire__dtype": "bf16", "train__layers_per_round": 1}
    apart_, _ = run_locally(sketching(tmp_path, wide, passes, run__id="apart", **coarse))
    config = sketching(tmp_path, wide, passes, run__id="hosted", **coarse)
    nodes: list[dict[str, Scalar]] = [{"partition-ids": "0-2"}, {"partition-id": 3}]
    nodes = [{"state": str(tmp_path / "clients"), "resident": True, **node} for node in nodes]
    adapter, result, _ = played(config, nodes)
    assert apart(saved_adapter(apart_), adapter) <= run_bound(1e-4)
    assert all(entry["failures"] == {} for entry in result["rounds"])


@pytest.mark.parametrize("kind", ["train", "train.project"])
def test_lost_answers_are_asked_for_again_to_the_same_bits(tmp_path, wide, monkeypatch, kind):
    config = sketching(tmp_path, wide, passes=2)
    simulation.in_process(config)
    held_folds._held.clear()

    class Losing(lost.Losing):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(simulation_pull(self, message_ids))
            seen = self.__dict__.setdefault("seen", set())
            for place, reply in enumerate(replies):
                key = (reply.metadata.message_type, reply.metadata.group_id, reply.metadata.src_node_id)
                if key[0] == kind and key not in seen:
                    replies[place] = Message(lost.LOST, reply_to=reply)
                    replies[place].metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
                seen.add(key)
            return replies

    simulation_pull = lost.local.LocalGrid.pull_messages
    other = parse({"run.id": "lossy"}, config)
    monkeypatch.setattr(simulation, "LocalGrid", Losing)
    simulation.in_process(other)
    assert_same(saved_adapter(folder_of(config)), saved_adapter(folder_of(other)))
    assert all(entry["failures"] == {} for entry in result_of(other)["rounds"])


def test_a_client_that_drops_out_between_the_passes_does_not_count(tmp_path, wide):
    """As if it had not been there: the others' means, ideal and weights, and its reason in the record."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.project" and context.node_config["partition-id"] == 0:
            raise OSError("gone")
        return client_app(message, context)

    def never(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            raise OSError("gone")
        return client_app(message, context)

    configs = [sketching(tmp_path, wide, passes=2, run__id=name, federation__rounds=1) for name in ("between", "never")]
    for config, app in zip(configs, (answer, never), strict=True):
        simulation.in_process(config, client_app=watching(app))
    between, without = (result_of(config)["rounds"][0] for config in configs)
    assert between["clients"].keys() == without["clients"].keys() == {"1", "2", "3"}
    assert list(between["failures"]) == ["0"]
    assert between["refused"] == [0]
    assert sum(client["weight"] for client in between["clients"].values()) == pytest.approx(1.0)
    assert apart(*(saved_adapter(folder_of(config)) for config in configs)) <= run_bound(1e-4)


def test_too_few_answers_to_the_second_question_fail_the_run(tmp_path, wide):
    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.project":
            raise OSError("gone")
        return client_app(message, context)

    config = sketching(tmp_path, wide, passes=2)
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        simulation.in_process(config, client_app=watching(answer))


@pytest.mark.parametrize(
    ("kind", "part", "factor", "says"),
    [
        ("train", "Y", 1e4, "moved the model by"),
        ("train", "Z", 1e4, "moved the model by"),
        ("train", "Y", float("nan"), "not finite"),
        ("train.project", "P", 1e4, "moved the model by"),
        ("train.project", "B", 1e4, "moved the model by"),
        ("train.project", "P", float("inf"), "not finite"),
    ],
)
def test_a_reply_that_moves_the_model_too_far_is_ignored(tmp_path, wide, kind, part, factor, says):
    """Whichever of its sketches is blown up."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == 2:
            with tensors_of(reply.content) as arrays:
                for name in [name for name in arrays if name.endswith(f"|{part}")]:
                    arrays[name] = arrays[name] * factor
        return reply

    passes = 2 if kind == "train.project" else 1
    config = sketching(tmp_path, wide, passes, federation__rounds=1)
    simulation.in_process(config, client_app=watching(answer))
    [entry] = result_of(config)["rounds"]
    assert list(entry["failures"]) == ["2"]
    assert says in entry["failures"]["2"]
    assert entry["clients"].keys() == {"0", "1", "3"}


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_that_died_in_a_round_ends_with_the_same_bits(tmp_path, wide, passes):
    config = sketching(tmp_path, wide, passes, federation__rounds=3)
    simulation.in_process(config)
    forget()
    folder = die(parse({"run.id": "broken"}, config), amid_round(2))
    go_on(folder)
    assert_same(saved_adapter(folder_of(config)), saved_adapter(folder))


def test_what_needs_single_replies_is_refused_in_one_sentence(tmp_path, tiny_llama):
    cases: list[tuple[dict[str, Scalar], str]] = [
        ({"strategy__name": "hetlora"}, "strategy.name = hetlora needs the clients' own factors"),
        (
            {"strategy__name": "raflora"},
            "use strategy.name = fedex, flexlora, flora, florist or lora-fair, or a linear",
        ),
        ({"strategy__robust": "norm-bound"}, "strategy.robust = norm-bound judges each client's update"),
        ({"wire__upload_dtype": "int8"}, "wire.upload-dtype = int8 rounds the change of factors"),
        ({"privacy__stages": f"{__name__}:Clipping"}, "Clipping of privacy.stages changes each reply on the server"),
    ]
    for keys, says in cases:
        with pytest.raises(StrategyError, match=r"^wire\.sum = sketch: ") as told:
            configured(sketching(tmp_path, tiny_llama, **keys))
        assert says in str(told.value)
        assert "\n" not in str(told.value)


def test_every_strategy_sketches_is_linear_or_is_refused(tmp_path, tiny_llama):
    for name in NAMES:
        kind = STRATEGIES.resolve(name)
        config = sketching(tmp_path, tiny_llama, strategy__name=name)
        if kind.linear or kind.of_ideal:
            configured(config)
        else:
            with pytest.raises(StrategyError, match=f"strategy.name = {name} needs the clients' own factors"):
                configured(config)


def test_around_a_strategy_of_the_ideal_the_wrappers_see_its_result(tmp_path, wide):
    keys: dict[str, Scalar] = {
        "strategy__name": "fedex",
        "strategy__server_optimizer": "momentum",
        "strategy__restart_every": 2,
        "federation__rounds": 3,
        "train__optimizer": "sgd",
        "train__lr": 0.5,
    }
    plain, _ = run_locally(tiny(tmp_path, wide, run__id="plain", **keys))
    summed, _ = run_locally(sketching(tmp_path, wide, **keys))
    assert apart(saved_adapter(plain), saved_adapter(summed)) <= run_bound(1e-4)


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_asks_twice_too(tmp_path, wide):
    config = sketching(tmp_path, wide, passes=2)
    simulation.in_process(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= run_bound(1e-6)
    for one, two in zip(result_of(config)["rounds"], result_of(other)["rounds"], strict=True):
        assert two["failures"] == {}
        assert two["upload-bytes"] == one["upload-bytes"]
        assert two["download-bytes"] == one["download-bytes"]
        assert torch.tensor(two["sketch-loss"]).log10() == pytest.approx(
            torch.tensor(one["sketch-loss"]).log10(), abs=1
        )
