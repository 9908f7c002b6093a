"""One client that is absurd, lies, or is refused: the round goes on, and the run's end says what was lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.clients.client_app import app as client_app
from fedlora.common.errors import FedLoraError, RunError, StrategyError
from fedlora.exchange import wire
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.strategies.base import Strategy
from fedlora.strategies.methods.fedavg_zeropad import FedAvgZeropad
from tests.federation import tensors_of, tiny

pytestmark = pytest.mark.usefixtures("fresh_process")
Change = Callable[[Message, RecordDict], Message | RecordDict | None]


def clients_with(change: Callable[[int, Message, Message], Message]) -> ClientApp:
    """The product's clients; `change` has the last word: client id, question, answer."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return change(int(context.node_config["partition-id"]), message, client_app(message, context))

    for name in (app.query, app.train, app.evaluate):
        name()(answer)
    return app


def scaled(size: float, number: int = 1, client: int = 2) -> ClientApp:
    """One client whose factors are this many times what it trained, in one round or in all (0)."""

    def change(who: int, question: Message, answer: Message) -> Message:
        if (
            who == client
            and question.metadata.message_type == "train"
            and number in (0, int(question.metadata.group_id))
        ):
            with tensors_of(answer.content) as arrays:
                for name, values in arrays.items():
                    if name[-1] in "ABR":
                        arrays[name] = (values + 1e-3) * values.dtype.type(size)
        return answer

    return clients_with(change)


def played(config, app: ClientApp | None = None) -> dict:
    simulation.in_process(config, client_app=app)
    return record_of(config)


def record_of(config) -> dict:
    return json.loads((folder_of(config) / "result.json").read_text())


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__name": "flora"},
        {"strategy__name": "fedavg", "lora__ranks": "2"},
        {"strategy__name": "lora-fair"},
        {"strategy__name": "fedsa", "evaluate__clients": True, "data__client_test_fraction": 0.3},
        {"strategy__name": "fedsb"},
    ],
    ids=lambda keys: "-".join(str(v) for v in keys.values()),
)
@pytest.mark.parametrize("size", [1e30, 1e6])
def test_an_absurd_update_is_set_aside_with_its_figure_and_the_round_goes_on(tmp_path, tiny_llama, keys, size):
    """Without a robust rule: a next round on it had no finite loss for anyone."""
    config = tiny(tmp_path, tiny_llama, **keys)
    result = played(config, scaled(size))
    entries = [entry for entry in result["rounds"] if entry["round"]]
    assert [set(entry["clients"]) for entry in entries] == [{"0", "1", "3"}, {"0", "1", "2", "3"}]
    [(client, reason)] = entries[0]["failures"].items()
    assert client == "2"
    assert "times the median of the others" in reason or "not finite in the compute dtype" in reason
    assert entries[0]["refused"] == [2]
    assert all(math.isfinite(entry["train-loss"]) for entry in entries)


def test_a_robust_rule_keeps_the_clients_that_it_needs(tmp_path, tiny_llama):
    """Krum of five withstands one that lies far out; without it there would be too few."""
    keys = {"strategy__robust": "krum", "federation__clients": 5, "data__partition": "iid"}
    result = played(tiny(tmp_path, tiny_llama, **keys), scaled(1e6, number=0))
    assert [(len(entry["clients"]), entry["failures"]) for entry in result["rounds"]] == [(5, {})] * 2
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] + 0.1


def test_the_round_is_as_if_that_client_had_not_answered(tmp_path, tiny_llama):
    one, two = (tiny(tmp_path, tiny_llama, federation__rounds=1, run__id=name) for name in ("one", "two"))
    absent = clients_with(
        lambda who, question, answer: (
            Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=question)
            if who == 2 and question.metadata.message_type == "train"
            else answer
        )
    )
    first = played(one, scaled(1e30))["rounds"][0]
    second = played(replace(two, federation=replace(two.federation, wait_timeout=0.1)), absent)["rounds"][0]
    assert first["heldout"] == second["heldout"]
    assert {c: a["weight"] for c, a in first["clients"].items()} == {
        c: a["weight"] for c, a in second["clients"].items()
    }


def diverging(beyond: float) -> Callable[[int, Message, Message], Message]:
    """Clients that have no finite loss where what they were sent holds values beyond this."""

    def change(who: int, question: Message, answer: Message) -> Message:
        if question.metadata.message_type == "train":
            sent = wire.decode_broadcast(question.content, question.content["head"]["base"])
            parts = [sent.adapter, *sent.folds]
            if max(float(t.abs().max()) for p in parts for f in p.lora.values() for t in (f.A, f.B)) > beyond:
                return Message(Error(wire.DIVERGED, "training diverged: loss nan at step 1"), reply_to=question)
        return answer

    return change


@pytest.mark.parametrize("keys", [{}, {"anchor__base_update": "merge"}, {"strategy__name": "lora-fair"}])
def test_a_round_on_which_nobody_can_train_is_taken_back_without_the_suspect(tmp_path, tiny_llama, caplog, keys):
    """The bound is off: the poison gets into the model, and the next round tells."""
    poison, honest = scaled(1e4, number=2), diverging(100.0)

    def both(message: Message, context: Context) -> Message:
        answered = poison(message, context)
        return honest(int(context.node_config["partition-id"]), message, answered)

    app = ClientApp()
    for name in (app.query, app.train, app.evaluate):
        name()(both)
    config = tiny(tmp_path, tiny_llama, federation__rounds=4, federation__max_move=0.0, **keys)
    result = played(config, app)
    assert result["status"] == "completed"
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3, 4]
    assert "client 2 is left out from now on, and the run goes on from before round 2" in caplog.text
    assert list(result["excluded"]) == ["2"]
    assert "taken-back" in result["rounds"][1]
    assert [set(entry["clients"]) for entry in result["rounds"][2:]] == [{"0", "1", "3"}] * 2
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


def test_where_all_diverge_alike_the_rate_is_to_blame(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, train__lr=1e30, federation__rounds=3)
    with pytest.raises(RunError, match=r"round \d: 0 of 4 clients answered.*training diverged.*lower train\.lr"):
        simulation.in_process(config)


def test_a_start_that_has_no_finite_loss_is_not_blamed_on_the_rate(tmp_path, tiny_llama):
    def spoilt(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            with tensors_of(message.content) as arrays:
                for name in arrays:
                    arrays[name] = arrays[name] * 0 + 3e38
        return client_app(message, context)

    app = ClientApp()
    for name in (app.query, app.train, app.evaluate):
        name()(spoilt)
    with pytest.raises(
        RunError, match="at step 1 of round 1, before anything was trained: the adapter that the"
    ) as got:
        simulation.in_process(tiny(tmp_path, tiny_llama), client_app=app)
    assert "lower train.lr" not in str(got.value)


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_after_a_divergence_the_process_trains_as_before(tmp_path, tiny_llama, task):
    """Gradients that were not let go of would enter the first step of the next training."""
    from tests.federation import write_labels

    keys = {}
    if task == "classification":
        keys = {
            "model__task": task,
            "data__source": str(write_labels(tmp_path / "l.jsonl")),
            "data__partition_by": "domain",
            "federation__clients": 2,
            "data__form": "label",
        }
    good = tiny(tmp_path, tiny_llama, federation__rounds=1, **keys)
    before = played(good)["rounds"][0]["train-loss"]
    with pytest.raises(FedLoraError, match="diverged"):
        simulation.in_process(tiny(tmp_path, tiny_llama, run__id="bad", train__lr=1e20, federation__rounds=3, **keys))
    again = tiny(tmp_path, tiny_llama, federation__rounds=1, run__id="again", **keys)
    assert played(again)["rounds"][0]["train-loss"] == before


def test_a_liar_about_its_examples_weighs_no_more_than_a_bounded_share(tmp_path, tiny_llama):
    def lie(who: int, question: Message, answer: Message) -> Message:
        if who == 2 and "num-examples" in answer.content["head"]:
            answer.content["head"]["num-examples"] = 10**9
        return answer

    result = played(tiny(tmp_path, tiny_llama), clients_with(lie))
    for entry in result["rounds"]:
        shares = {client: answer["weight"] for client, answer in entry["clients"].items()}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["2"] == pytest.approx(4 / 7, rel=0.05)  # four times the mean of three others
        assert min(shares.values()) > 0.1
    free = played(tiny(tmp_path, tiny_llama, run__id="two", federation__max_share=0.0), clients_with(lie))
    assert free["rounds"][0]["clients"]["2"]["weight"] > 0.999


def refused(message: Message, who: int, client: int = 2) -> bool:
    return who == client and message.metadata.message_type == "train"


@pytest.mark.parametrize(
    ("code", "fails"),
    [
        (wire.REFUSED, True),
        (wire.DIVERGED, True),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, True),
        (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, True),
        (ErrorCode.NODE_UNAVAILABLE, False),
    ],
)
def test_a_client_that_is_refused_every_time_is_no_success(tmp_path, tiny_llama, code, fails):
    """All rounds are done and everything is saved; an accident, such as a dead node, is no such thing."""
    app = clients_with(
        lambda who, question, answer: (
            Message(Error(code, "not I"), reply_to=question) if refused(question, who) else answer
        )
    )
    config = tiny(tmp_path, tiny_llama, federation__lost_clients="fail", federation__wait_timeout=0.1)
    if not fails:
        assert played(config, app)["status"] == "completed"
        return
    with pytest.raises(
        RunError, match=r"all 2 rounds are done and the adapter is saved, but without .*client 2 \w+: not I"
    ):
        simulation.in_process(config, client_app=app)
    result = record_of(config)
    assert (result["status"], len(result["rounds"])) == ("failed", 2)
    assert (folder_of(config) / "adapter" / "adapter_model.safetensors").exists()
    accepted = tiny(tmp_path, tiny_llama, run__id="two", federation__lost_clients="accept")
    assert played(accepted, app)["status"] == "completed"


def test_a_client_that_counts_once_is_not_lost(tmp_path, tiny_llama):
    app = clients_with(
        lambda who, question, answer: (
            Message(Error(wire.REFUSED, "not I"), reply_to=question)
            if refused(question, who) and question.metadata.group_id == "1"
            else answer
        )
    )
    assert played(tiny(tmp_path, tiny_llama, federation__lost_clients="fail"), app)["status"] == "completed"


def test_an_app_that_cannot_be_loaded_is_told_at_once_and_not_waited_for(tmp_path, tiny_llama):
    """It is there, and would answer the same again: only a node that is gone is asked again."""
    app = clients_with(
        lambda who, question, answer: Message(
            Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "no such module"), reply_to=question
        )
    )
    config = tiny(tmp_path, tiny_llama, federation__wait_timeout=3600.0)
    with pytest.raises(RunError, match=r"0 of 4 clients can take part.*failed: no such module"):
        simulation.in_process(config, client_app=app)


def test_a_client_that_is_refused_at_the_start_is_lost_too(tmp_path, tiny_llama):
    app = clients_with(
        lambda who, question, answer: (
            Message(Error(wire.REFUSED, "not I"), reply_to=question)
            if who == 2 and question.metadata.message_type == "query"
            else answer
        )
    )
    config = tiny(tmp_path, tiny_llama, federation__lost_clients="fail")
    with pytest.raises(RunError, match=r"refused every time: node 4 refused: not I"):
        simulation.in_process(config, client_app=app)


@dataclass(frozen=True)
class Nan(FedAvgZeropad):
    """A user's own strategy that returns what is no number."""

    def aggregate(self, state, updates, number):
        new = super().aggregate(state, updates, number)
        lora = {name: replace(f, B=f.B * float("nan")) for name, f in new.adapter.lora.items()}
        return replace(new, adapter=replace(new.adapter, lora=lora))


@dataclass(frozen=True)
class Nothing(FedAvgZeropad):
    def aggregate(self, state, updates, number):
        list(updates)


@dataclass(frozen=True)
class Fewer(FedAvgZeropad):
    def aggregate(self, state, updates, number):
        new = super().aggregate(state, updates, number)
        first = next(iter(new.adapter.lora))
        return replace(new, adapter=replace(new.adapter, lora={first: new.adapter.lora[first]}))


@dataclass(frozen=True)
class Turned(FedAvgZeropad):
    def aggregate(self, state, updates, number):
        new = super().aggregate(state, updates, number)
        lora = {name: replace(f, A=f.A.T.contiguous()) for name, f in new.adapter.lora.items()}
        return replace(new, adapter=replace(new.adapter, lora=lora))


@dataclass(frozen=True)
class Broken(FedAvgZeropad):
    def aggregate(self, state, updates, number):
        list(updates)
        return {}["oops"]


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Nan, "round 1: aggregate returned values that are not finite, in model.layers"),
        (Nothing, "round 1: aggregate returned NoneType, expected a ServerState"),
        (Fewer, "round 1: aggregate returned other modules than it was given"),
        (Turned, r"round 1: aggregate returned model\..* as A \[64, 4\] and B \[32, 4\], expected \[r, 64\]"),
        (Broken, "its aggregate failed in round 1: KeyError: 'oops'"),
    ],
)
def test_what_a_users_own_strategy_returns_is_checked_and_named(tmp_path, tiny_llama, strategy: type[Strategy], says):
    name = f"tests.simulations.test_one_against_the_rest:{strategy.__name__}"
    with pytest.raises(StrategyError, match=f"strategy.name = '{name}': {says}"):
        simulation.in_process(tiny(tmp_path, tiny_llama, strategy__name=name))


def test_two_nodes_that_say_they_are_one_client_do_not_stop_the_run(tmp_path, tiny_llama, caplog):
    """Whoever is known first keeps the id; the other is refused and named."""

    def claim(who: int, question: Message, answer: Message) -> Message:
        if who == 2 and question.metadata.message_type == "query":
            answer.content["head"]["client-id"] = 1
        return answer

    result = played(tiny(tmp_path, tiny_llama, federation__wait_timeout=0.0), clients_with(claim))
    assert "node 4 says that it is client 1, and is refused: node 3 is that client already" in caplog.text
    assert [set(entry["clients"]) for entry in result["rounds"]] == [{"0", "1", "3"}] * 2
    assert torch.isfinite(torch.tensor([entry["train-loss"] for entry in result["rounds"]])).all()
