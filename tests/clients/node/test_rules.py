"""What a node decides for itself, whatever a server says."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Message

from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds, rules
from fedlora.common.errors import ConfigError
from fedlora.config import Config, parse
from fedlora.exchange import Broadcast, Plan, wire
from fedlora.models import adapted, base_fingerprint
from fedlora.simulations.engines import local
from fedlora.strategies.initializers import uniform
from tests.federation import tiny, write_rows


@pytest.fixture(autouse=True)
def _outside_of_simulations(monkeypatch):
    monkeypatch.delenv(rules.ALLOW_FILES, raising=False)
    monkeypatch.delenv(rules.PLUGINS, raising=False)
    yield
    adapted.forget()
    held_folds._held.clear()


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "rows.jsonl", "~/x.csv", "../up", "a/b/c", "s3://b/x", "owner/x.json"]
)
def test_a_server_names_no_file_as_data(source):
    with pytest.raises(ConfigError, match=r"data\.source = .* set data in the node's config, or allow-files = true"):
        rules.ruled(parse({"data.source": source}), {})


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "~/llama", "../llama", "x.gguf", "a/b/c"])
def test_a_server_names_no_folder_as_model(name):
    with pytest.raises(ConfigError, match=r"model\.name = .* set model in the node's config, or allow-files = true"):
        rules.ruled(parse({"model.name": name}), {})


def test_a_hub_id_that_is_a_folder_here_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("model.name", "data.source"):
        config = parse({key: "owner/name"})
        assert rules.ruled(config, {}) == config
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for key in ("model.name", "data.source"):
        with pytest.raises(ConfigError, match=key):
            rules.ruled(parse({key: "owner/name"}), {})


@pytest.mark.parametrize("source", ["chitchat", "sentiment", "owner/name", "name"])
def test_packaged_names_and_hub_ids_are_taken(source):
    config = parse({"data.source": source})
    assert rules.ruled(config, {"partition-id": 1, "num-partitions": 2, "rank": 4}) == config


def test_files_are_allowed_by_the_node_or_its_environment_and_by_nobody_else(monkeypatch):
    config = parse({"data.source": "/some/rows.jsonl", "model.name": "/some/model"})
    assert rules.ruled(config, {"allow-files": True}) == config
    monkeypatch.setenv(rules.ALLOW_FILES, "1")
    assert rules.ruled(config, {}) == config
    with pytest.raises(ConfigError, match="opens no file that a server names"):
        rules.ruled(config, {"allow-files": False})
    with pytest.raises(ConfigError, match="allow-files = 'true', expected true or false"):
        rules.ruled(config, {"allow-files": "true"})
    with pytest.raises(ConfigError, match=r"unknown key 'data\.allow-files'"):
        parse({"data.allow-files": True})


def test_a_nodes_own_file_and_columns_replace_what_the_server_names(tmp_path):
    own = write_rows(tmp_path / "own.jsonl")
    config = parse(
        {
            "data.source": "/etc/passwd",
            "data.prompt-column": "diagnosis",
            "data.text-column": "name",
            "data.image-column": "face",
            "data.partition": "dirichlet",
            "federation.min-clients": 3,
        }
    )
    data = rules.ruled(config, {"data": str(own), "response-column": "answer"}).data
    assert (data.source, data.partition, data.heldout_fraction) == (str(own), "iid", 0.0)
    assert (data.prompt_column, data.response_column, data.text_column) == ("prompt", "answer", "text")
    assert rules.ruled(config, {"data": str(own), "form": "text"}).data.form == "text"
    folder = rules.ruled(config, {"data": str(tmp_path), "image-column": "scan"}).data  # of images
    assert (folder.source, folder.image_column, data.image_column) == (str(tmp_path), "scan", "image")
    with pytest.raises(ConfigError, match="data does not name a file"):
        rules.ruled(config, {"data": str(tmp_path / "none.jsonl")})
    with pytest.raises(ConfigError, match="prompt-column describes a file of the node's own, but data names none"):
        rules.ruled(parse({}), {"prompt-column": "x"})


def test_a_node_takes_its_own_model_whatever_the_server_calls_it():
    config = parse({"model.name": "/models/llama", "model.revision": "main"})
    ruled = rules.ruled(config, {"model": "/own/llama", "device": "cpu"}).model
    assert (ruled.name, ruled.revision, ruled.device) == ("/own/llama", "", "cpu")


@pytest.mark.parametrize(
    ("asked", "limits", "says"),
    [
        (
            {"data.max-length": 512},
            {"max-length": 256},
            r"data\.max-length = 512.*allows at most 256 \(node config: max-length",
        ),
        (
            {"train.batch-size": 8, "train.accumulate": 4},
            {"max-batch": 31},
            r"train\.batch-size \* train\.accumulate = 32.*allows at most 31 \(node config: max-batch",
        ),
        ({"evaluate.batch-size": 64}, {"max-batch": 32}, r"evaluate\.batch-size = 64.*node config: max-batch"),
        ({}, {"max-length": 0}, "max-length = 0, expected a positive integer"),
        ({}, {"max-batch": "8"}, "max-batch = '8', expected a positive integer"),
        ({}, {"max_steps": 5}, "unknown key 'max_steps'; did you mean 'max-steps'"),
        ({}, {"dataa": "x"}, "unknown key 'dataa'; did you mean 'data'"),
    ],
)
def test_what_a_node_does_not_allow_is_refused_by_its_key(asked, limits, says):
    with pytest.raises(ConfigError, match=says):
        rules.ruled(parse(asked), limits)


def test_limits_that_are_kept_and_keys_of_other_apps_change_nothing():
    config = parse({"data.max-length": 128, "train.batch-size": 4, "train.accumulate": 2, "evaluate.batch-size": 8})
    assert rules.ruled(config, {"max-length": 128, "max-batch": 8, "max-steps": 1, "hospital": "north"}) == config
    images = parse({"model.task": "image-classification", "model.labels": 2})
    assert rules.ruled(images, {"max-length": 64}) == images, "images have no tokens"


@pytest.mark.parametrize(
    ("keys", "own", "expected"),
    [
        ({"lora.ranks": "16,8"}, {}, 8),
        ({"lora.ranks": "16,8"}, {"max-rank": 4}, 4),
        ({"lora.ranks": "16,8"}, {"max-rank": 32}, 8),
        ({"lora.ranks": "16,8"}, {"rank": 2, "max-rank": 4}, 2),
    ],
)
def test_the_rank_is_the_nodes_or_the_runs_and_never_above_its_limit(keys, own, expected):
    assert rules.rank(parse(keys), own, 1) == expected


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": "4"}, {"rank": True}, {"rank": 8, "max-rank": 4}])
def test_a_wrong_rank_is_refused(bad):
    with pytest.raises(ConfigError, match="node config: rank"):
        rules.rank(parse({}), bad, 0)


def test_a_rank_pattern_cannot_raise_the_limit():
    with pytest.raises(ConfigError, match=r"k_proj = 64, but this node allows at most 8 \(node config: max-rank\)"):
        rules.rank(parse({"lora.rank-pattern": "k_proj=64"}), {"max-rank": 8}, 0)


@pytest.mark.parametrize(
    ("keys", "steps", "says"),
    [
        ({"train.steps": 9}, 9, "train.steps = 9"),
        ({"train.steps": 0, "train.epochs": 50.0}, 700, "epochs = 50 .700 st"),
    ],
)
def test_steps_are_limited_however_they_are_asked_for(keys, steps, says):
    train = parse(keys).train
    rules.check_steps(train, {}, steps)
    rules.check_steps(train, {"max-steps": steps}, steps)
    with pytest.raises(ConfigError, match=rf"{says}.*node config: max-steps"):
        rules.check_steps(train, {"max-steps": steps - 1}, steps)


# a node that is asked by message


def ask(config: Config, settings: dict[str, Any], kind: str = "query", job: str = "train") -> Message:
    grid = local.LocalGrid(client_app, [{"partition-id": 0, "allow-files": False, **settings}], config.to_flat(), 7)
    fingerprint = base_fingerprint(config.model)
    content = wire.encode_hello(fingerprint)
    if kind == "train":
        [client] = [wire.decode_info(ask(config, settings).content, fingerprint, "node")]
        sent = Broadcast(round=1, adapter=uniform.seeded(config, [client]))
        if job != "train":
            sent = replace(sent, round=0, job=job, plan=Plan(train=frozenset()))
        content = wire.encode_broadcast(sent, fingerprint)
    [answer] = grid.send_and_receive([Message(content, 2, kind, group_id="1")])
    return answer


def reason(answer: Message) -> str:
    assert answer.has_error()
    assert answer.error.code == wire.REFUSED
    return str(answer.error.reason)


def test_a_node_answers_with_its_own_file_and_model_alone(tmp_path, tiny_llama):
    own = write_rows(tmp_path / "own.jsonl", people=1, rows=21)
    config = tiny(tmp_path, tiny_llama, federation__clients=2)
    assert "data.source" in reason(ask(config, {"model": str(tiny_llama)}))
    assert "model.name" in reason(ask(config, {"data": str(own)}))
    answer = ask(config, {"data": str(own), "model": str(tiny_llama), "max-rank": 3})
    info = wire.decode_info(answer.content, base_fingerprint(config.model), "node")
    assert (info.num_examples, info.rank) == (21, 3)
    for limit, key in (
        ({"max-steps": 2}, "train.steps"),
        ({"max-length": 32}, "max-length"),
        ({"max-batch": 1}, "batch"),
    ):
        said = reason(ask(config, {"data": str(own), "model": str(tiny_llama), **limit}))
        assert key in said
        assert f"(node config: {next(iter(limit))})" in said


def test_a_node_whose_rows_are_long_says_so_in_its_log(tmp_path, tiny_llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)
    own = write_rows(tmp_path / "own.jsonl", people=1, rows=21)
    config = tiny(tmp_path, tiny_llama, federation__clients=1, data__max_length=32)
    assert not ask(config, {"data": str(own), "model": str(tiny_llama)}, "train").has_error()
    assert "81% of the rows are longer than data.max-length = 32 tokens and are cut; " in caplog.text


def test_what_is_wrong_with_a_nodes_rows_stays_on_the_node(tmp_path, tiny_llama, caplog):
    """The server learns that there is an error, and the log where: neither quotes a row."""
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": ["secret illness"], "response": "x"}\n' * 3, encoding="utf-8")
    config = tiny(tmp_path, tiny_llama, federation__clients=1)
    with caplog.at_level(logging.ERROR, logger="fedlora"):
        said = reason(ask(config, {"data": str(own), "model": str(tiny_llama)}, "train"))
    assert "secret" not in said
    assert str(tmp_path) not in said
    assert "the node's log says why" in said
    assert "own.jsonl: line 1: column 'prompt' holds a list of 1, expected text" in caplog.text
    assert "secret" not in caplog.text


def test_a_crash_beside_own_data_tells_its_kind_alone(tmp_path, tiny_llama, monkeypatch):
    own = write_rows(tmp_path / "own.jsonl", people=1)
    config = tiny(tmp_path, tiny_llama, federation__clients=1)

    def crash(*_: object) -> None:
        raise ValueError("secret illness")

    monkeypatch.setattr(rules, "rank", crash)
    answer = ask(config, {"data": str(own), "model": str(tiny_llama)})
    assert answer.has_error()
    assert answer.error.reason == "ValueError on a node with its own data; the node's log says more"


def test_a_strategy_of_ones_own_is_never_imported_on_a_node(tmp_path, tiny_llama, monkeypatch):
    package = tmp_path / "evil_strategy.py"
    package.write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny(tmp_path, tiny_llama, federation__clients=1, strategy__name="evil_strategy:Class")
    answer = ask(config, {"allow-files": True}, "train")
    assert not answer.has_error()
    assert "evil_strategy" not in sys.modules


@pytest.mark.parametrize("key", ["model.task", "train.optimizer", "lora.kind"])
def test_code_that_a_run_names_is_imported_where_the_node_says_so(tmp_path, tiny_llama, monkeypatch, key):
    name = "evil_plugin:Class"
    (tmp_path / "evil_plugin.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = parse({key: name}, tiny(tmp_path, tiny_llama, federation__clients=1))
    for allowed in ({"plugins": ""}, {"plugins": "mypkg.mine:MyTask"}):
        answer = ask(config, {"allow-files": True} | allowed)
        assert f"{key} = 'evil_plugin:Class' is not part of fedlora, and this node imports no" in reason(answer)
    assert "evil_plugin" not in sys.modules
    assert rules.ruled(config, {"allow-files": True, "plugins": f"mypkg.mine:MyTask, {name}"}) == config
    assert rules.ruled(config, {"allow-files": True, "plugins": "any"}) == config
    with pytest.raises(ConfigError, match=r"node config: plugins = 1, expected names such as"):
        rules.check({"plugins": 1})


def test_what_is_sent_holds_no_metric_beyond_the_list(tmp_path, tiny_llama):
    answer = ask(tiny(tmp_path, tiny_llama, federation__clients=1), {"allow-files": True}, "train")
    assert set(answer.content["metrics"]) == wire.TRAIN_METRICS


def test_the_in_process_engine_lets_clients_open_the_users_own_files():
    grid = local.LocalGrid(client_app, [{}, {"allow-files": False}], {}, 1)
    assert [grid.context(node).node_config["allow-files"] for node in grid.get_node_ids()] == [True, False]
