"""One list of class names for all: nodes that number their own names otherwise are refused before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedlora.clients.answering import together
from fedlora.clients.client_app import app as client_app
from fedlora.common.errors import ConfigError, RunError
from fedlora.config import Config
from fedlora.models import peft_files
from fedlora.models.base.read import quiet
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import local
from fedlora.strategies.server_app import app as server_app
from fedlora.trained import export
from tests.federation import run_locally, tiny


@pytest.fixture(autouse=True)
def _fresh(fresh_process: None) -> None:
    """Bases and folds of one test are not the next one's."""


def hospital(path: Path, names: list[Any], rows: int = 12) -> Path:
    """Rows of one node, whose classes take turns."""
    found = [{"text": f"ash {number}", "label": names[number % len(names)]} for number in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def federation(folder: Path, model: Path, **keys: Any) -> Config:
    few = {"federation__rounds": 1, "federation__clients": 3, "evaluate__server": False, "model__labels": 3}
    plain = {"model__task": "classification", "strategy__name": "fedavg", "lora__ranks": "2", "train__steps": 1}
    return tiny(folder, model, **{**few, **plain, "federation__wait_timeout": 0.0, **keys})


def run_nodes(config: Config, files: list[Path]) -> dict[str, Any]:
    """A federation whose nodes have a file each; its result.json."""
    flat = config.to_flat()
    nodes: list[Any] = [{"partition-id": client, "data": str(path)} for client, path in enumerate(files)]
    grid = local.LocalGrid(client_app, nodes, flat, 7, together)
    server_app(grid, Context(7, 1, {}, RecordDict(), flat))
    return json.loads((folder_of(config) / "result.json").read_text(encoding="utf-8"))


def test_names_that_differ_between_nodes_are_refused_before_training(tmp_path: Path, tiny_llama: Path) -> None:
    names = [["benign", "malignant", "unclear"], ["benign", "unclear"], ["unclear", "malignant", "benign"]]
    files = [hospital(tmp_path / f"h{number}.jsonl", found) for number, found in enumerate(names)]
    result = run_nodes(federation(tmp_path, tiny_llama), files)
    assert [client["client-id"] for client in result["clients"]] == [0, 2]
    assert result["classes"] == ["benign", "malignant", "unclear"]
    with pytest.raises(
        RunError,
        match=r"client 1 calls its classes \(benign, unclear\), but most others \(benign, malignant, unclear\); set "
        r"the run's data\.label-names to one list for all",
    ):
        run_nodes(federation(tmp_path, tiny_llama, run__id="two", federation__lost_clients="fail"), files)


def test_a_file_without_the_column_is_refused_alone(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)
    files = [hospital(tmp_path / f"h{number}.jsonl", ["a", "b", "c"]) for number in range(3)]
    files[1].write_text('{"text": "secret", "class": "a"}\n' * 6, encoding="utf-8")
    for at_once in ("1", "3"):
        config = federation(tmp_path, tiny_llama, train__clients_at_once=at_once, run__id=f"by-{at_once}")
        result = run_nodes(config, files)
        assert set(result["rounds"][0]["clients"]) == {"0", "2"}
    assert (
        "h1.jsonl: no column 'label', which data.form = 'label' needs; the columns are 'text', 'class'" in caplog.text
    )
    assert "secret" not in caplog.text


def test_a_list_of_names_makes_them_agree(tmp_path: Path, tiny_llama: Path) -> None:
    names = [["benign", "malignant", "unclear"], ["unclear", "benign"], [0, 1, 2]]
    files = [hospital(tmp_path / f"h{number}.jsonl", found) for number, found in enumerate(names)]
    result = run_nodes(federation(tmp_path, tiny_llama, data__label_names="unclear, benign, malignant"), files)
    assert [client["client-id"] for client in result["clients"]] == [0, 1, 2]
    assert result["classes"] == ["unclear", "benign", "malignant"]


def test_names_and_numbers_are_no_one_list(tmp_path: Path, tiny_llama: Path) -> None:
    names: list[list[Any]] = [[0, 1, 2], ["benign", "malignant", "unclear"], [0, 2]]
    files = [hospital(tmp_path / f"h{number}.jsonl", found) for number, found in enumerate(names)]
    with pytest.raises(RunError, match=r"client 1 calls its classes \(benign, .*\), but most others by numbers; set"):
        run_nodes(federation(tmp_path, tiny_llama, federation__lost_clients="fail"), files)


def test_the_servers_own_rows_say_what_classes_are_called(tmp_path: Path, tiny_llama: Path) -> None:
    own = hospital(tmp_path / "server.jsonl", ["benign", "malignant", "unclear"], rows=40)
    files = [hospital(tmp_path / f"h{number}.jsonl", ["benign", "unclear"]) for number in range(3)]
    keys = {"data__source": str(own), "data__partition": "iid", "evaluate__server": True}
    with pytest.raises(
        RunError, match=r"calls its classes \(benign, unclear\), but the server \(benign, malignant, un"
    ):
        run_nodes(federation(tmp_path, tiny_llama, **keys), files)


def test_texts_in_the_label_column_do_not_leave_a_node(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = [f"secret {number}" for number in range(12)]
    files = [
        hospital(tmp_path / f"h{number}.jsonl", found) for number, found in enumerate([[0, 1, 2], secrets, [0, 1]])
    ]
    run_nodes(federation(tmp_path, tiny_llama), files)
    events = (folder_of(federation(tmp_path, tiny_llama)) / "events.jsonl").read_text(encoding="utf-8")
    assert "the file that data names cannot be used; the node's log says why" in events
    assert "secret" not in events + caplog.text


def test_names_travel_into_the_result_the_card_and_every_export(tmp_path: Path, tiny_bert: Path) -> None:
    source = hospital(tmp_path / "all.jsonl", ["malignant", "benign", "unclear"], rows=60)
    keys = {"data__source": str(source), "data__partition": "iid", "evaluate__server": True, "data__max_length": 4}
    folder, result = run_locally(
        federation(tmp_path, tiny_bert, **keys, lora__target_modules="query,value", train__steps=3)
    )
    names = ["benign", "malignant", "unclear"]
    assert result["classes"] == names
    assert result["rounds"][0]["train-cut"] == 1.0
    run = export.find(folder)
    for out, write in (("adapter", export.write_adapter), ("merged", export.write_merged)):
        write(run, peft_files.read_adapter(run.adapter), tmp_path / out, lambda state: state, {})
        settings = AutoConfig.from_pretrained(tmp_path / out)
        assert settings.id2label == dict(enumerate(names))
        assert settings.label2id == {name: number for number, name in enumerate(names)}
        card = (tmp_path / out / "README.md").read_text(encoding="utf-8")
        assert "- **Classes:** 0 benign, 1 malignant, 2 unclear\n" in card
        assert (
            "- **Largest number of tokens:** 4; 100.0% of the rows that were trained on are longer and were cut" in card
        )
    assert "id2label={0: 'benign', 1: 'malignant', 2: 'unclear'}, label2id={'benign': 0," in (
        tmp_path / "adapter" / "README.md"
    ).read_text(encoding="utf-8")
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, config=AutoConfig.from_pretrained(tmp_path / "adapter")
        )
    assert PeftModel.from_pretrained(base, str(tmp_path / "adapter")).config.id2label[2] == "unclear"


def test_a_models_own_head_has_the_classes_in_the_rows_order(tmp_path: Path, tiny_bert: Path) -> None:
    with quiet():
        own = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, id2label={0: "Yes", 1: "No"}, label2id={"Yes": 0, "No": 1}
        )
        own.save_pretrained(tmp_path / "own")
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "own")
    source = hospital(tmp_path / "all.jsonl", ["yes", "no"], rows=60)
    keys: dict[str, Any] = {"data__source": str(source), "data__partition": "iid", "model__labels": 2}
    keys["lora__target_modules"] = "query,value"
    with pytest.raises(
        ConfigError, match=r"order \(Yes, No\), but the rows have \(no, yes\); set data\.label-names = 'yes, no'"
    ):
        run_locally(federation(tmp_path, tmp_path / "own", **keys))
    for more in ({"data__label_names": "yes, no"}, {"model__head": "fresh"}):
        _, result = run_locally(federation(tmp_path, tmp_path / "own", **keys, **more, run__id="-".join(more)))
        assert result["status"] == "completed"


def test_as_many_names_as_classes_are_asked_for_before_the_run(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"names 2 classes, but model\.labels = 3"):
        run_locally(federation(tmp_path, tiny_llama, data__label_names="benign,malignant"))
