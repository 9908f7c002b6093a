"""A node's own limit of epsilon: what is counted, and when the node no longer takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from flwr.app import Context, RecordDict

from fedlora.clients.node import rules, spent
from fedlora.common import accountant
from fedlora.common.errors import ConfigError, DataError
from fedlora.config import Config, parse
from fedlora.exchange.privacy import mechanism
from tests.clients.node.test_rules import ask, reason
from tests.federation import tiny, write_rows

DELTA = 1e-3
ROWS = 21


def context(tmp_path: Path, **settings: Any) -> Context:
    node = {"state": str(tmp_path / "state"), "max-epsilon": 8.0, "delta": DELTA, **settings}
    return Context(run_id=7, node_id=1, node_config=node, state=RecordDict(), run_config={})


def config(noise: float = 1.0, **keys: Any) -> Config:
    about = {"privacy.level": "example", "privacy.noise-multiplier": noise, "train.batch-size": 2, "train.steps": 3}
    return parse({**about, **keys})


def after(noise: float, rounds: int) -> float:
    made = mechanism(config(noise), ROWS)
    assert made is not None
    return accountant.epsilon(made.noise_multiplier, made.rate, 3 * rounds, DELTA)


def between(noise: float, rounds: int) -> float:
    """A limit that so many rounds keep, and one more does not."""
    return (after(noise, rounds) + after(noise, rounds + 1)) / 2


def test_rounds_of_all_runs_add_up_until_the_limit(tmp_path):
    here = context(tmp_path, **{"max-epsilon": between(1.0, 4)})
    for run in ("one", "one", "two", "three"):
        spent.charge(config(), here, run, ROWS)
    for run in ("one", "two", "four"):  # also after a restart, which has nothing but the file
        with pytest.raises(
            ConfigError, match=r"would bring the epsilon .* at delta 0\.001, .*\(node config: max-epsilon\)"
        ):
            spent.charge(config(), context(tmp_path, **here.node_config), run, ROWS)
    kept = json.loads((tmp_path / "state" / "spent" / "own.json").read_text())
    assert {each["run"]: each["rounds"] for each in kept} == {"one": 2, "two": 1, "three": 1}


def test_what_the_server_says_of_delta_and_rounds_changes_nothing(tmp_path):
    here = context(tmp_path, **{"max-epsilon": between(1.0, 1)})
    spent.charge(config(), here, "one", ROWS)
    for keys in ({"privacy.delta": 0.4}, {"federation.rounds": 1}, {"run.id": "new", "run.seed": 3}):
        with pytest.raises(ConfigError, match="node config: max-epsilon"):
            spent.charge(config(**keys), here, "two", ROWS)


def test_different_mechanisms_are_composed_as_the_library_does(tmp_path):
    here = context(tmp_path, **{"max-epsilon": 100.0})
    for noise in (1.0, 2.0, 1.0):
        spent.charge(config(noise), here, "one", ROWS)
    entries = json.loads((tmp_path / "state" / "spent" / "own.json").read_text())
    account = PLDAccountant(value_discretization_interval=1e-3)
    for noise, count in ((1.0, 6), (2.0, 3)):
        made = mechanism(config(noise), ROWS)
        assert made is not None
        sampled = dp_accounting.PoissonSampledDpEvent(made.rate, dp_accounting.GaussianDpEvent(noise))
        account.compose(dp_accounting.SelfComposedDpEvent(sampled, count))
    assert spent.epsilon(entries, DELTA) == pytest.approx(account.get_epsilon(DELTA), rel=1e-6)


def test_rows_have_one_account_whatever_number_a_server_gives_their_client(tmp_path):
    own = write_rows(tmp_path / "own.jsonl")
    for settings in ({"data": str(own)}, {"data": str(own), "partition-id": 3}, {}, {"partition-id": 3}):
        spent.charge(config(), context(tmp_path, **settings), "one", ROWS)
    accounts = {path.stem: json.loads(path.read_text())[0]["rounds"] for path in (tmp_path / "state").rglob("*.json")}
    assert accounts == {"own": 3, "client-3": 1}


@pytest.mark.parametrize(
    "content", ["", "[{}]", '[{"run": "a", "noise_multiplier": 1, "rate": 0.1, "steps": 3, "rounds": -9}]']
)
def test_an_account_that_cannot_be_read_is_not_begun_anew(tmp_path, content):
    path = tmp_path / "state" / "spent" / "own.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match="the account of what this node's rows have cost cannot be read"):
        spent.charge(config(), context(tmp_path), "one", ROWS)
    assert path.read_text() == content


def test_without_a_limit_nothing_is_kept(tmp_path):
    plain = context(tmp_path)
    del plain.node_config["max-epsilon"], plain.node_config["delta"]
    spent.charge(config(), plain, "one", ROWS)
    assert not (tmp_path / "state").exists()


def test_next_to_no_noise_is_refused_without_counting_it(tmp_path):
    with pytest.raises(ConfigError, match=r"at least 0\.1 times \(node config: max-epsilon\)"):
        spent.charge(config(0.05), context(tmp_path), "one", ROWS)


@pytest.mark.parametrize(
    ("asked", "limits", "says"),
    [
        (
            {"privacy.level": "none", "privacy.noise-multiplier": 0.0},
            {},
            r"the run has privacy\.level = none.*needs example",
        ),
        ({"privacy.level": "client"}, {}, r"max-epsilon\), and the run has privacy\.level = client.*needs example"),
        (
            {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 50.0},
            {},
            r"privacy\.epsilon = 50, which is more than 8",
        ),
        ({"evaluate.clients": True}, {}, r"evaluate\.clients = true, whose metrics have no noise"),
        ({}, {"max-epsilon": 0}, "max-epsilon = 0, expected a number above 0"),
        ({}, {"max-epsilon": "8"}, "max-epsilon = '8', expected a number above 0"),
        ({}, {"delta": 2.0}, "delta = 2.0, expected a number above 0 and below 1"),
        ({}, {"max-epsilon": 8, "max_epsilon": 8}, "unknown key 'max_epsilon'; did you mean 'max-epsilon'"),
    ],
)
def test_what_no_account_covers_is_refused(asked, limits, says):
    with pytest.raises(ConfigError, match=says):
        rules.ruled(config(**asked), {"max-epsilon": 8.0, **limits})


def test_a_delta_alone_limits_nothing_and_is_refused():
    with pytest.raises(ConfigError, match="delta is that of max-epsilon, which is not set"):
        rules.check({"delta": 1e-6})


def test_a_node_that_is_asked_counts_and_then_refuses(tmp_path, tiny_llama):
    """The same message again and again, as a server that undoes its rounds sends it, and one without privacy."""
    own = write_rows(tmp_path / "own.jsonl", people=1, rows=ROWS)
    keys = {"privacy__level": "example", "privacy__noise_multiplier": 1.0, "train__batch_size": 2, "train__steps": 3}
    run = tiny(tmp_path, tiny_llama, federation__clients=1, **keys)
    node = {"data": str(own), "model": str(tiny_llama), "state": str(tmp_path / "state")}
    node |= {"max-epsilon": between(1.0, 2), "delta": DELTA}
    start = parse({"privacy.start": "noise", "lora.init": "lora-ga"}, run)
    assert not ask(start, node, "train", job="gradient").has_error()  # a start with noise costs a round
    assert not ask(run, node, "train").has_error()
    assert "would bring the epsilon of this node's rows to" in reason(ask(run, node, "train"))
    plain = tiny(tmp_path, tiny_llama, federation__clients=1)
    assert "the run has privacy.level = none" in reason(ask(plain, node))
