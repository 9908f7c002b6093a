"""What a run says of its base, takes from it, and refuses because of it before anybody trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForSequenceClassification

from fedlora.cli.main import main
from fedlora.common.errors import ConfigError, ModelError
from fedlora.deployment.flower_programs import config_table
from fedlora.models.base.read import quiet
from fedlora.models.peft_files import read_adapter
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.federation import run_locally, tiny, write_labels
from tests.tiny import save_gpt2

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def classifier(tiny_bert: Path, tmp_path: Path) -> Path:
    """A folder with a head that nobody would draw: it gives class 1 nearly all of the probability."""
    folder = shutil.copytree(tiny_bert, tmp_path / "classifier")
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)
        model.classifier.bias.copy_(torch.tensor([-8.0, 8.0]))
    with quiet():
        model.save_pretrained(folder)
    return folder


def of_labels(tmp_path: Path, model: Path, **keys: bool | int | float | str):
    rows = write_labels(tmp_path / "labels.jsonl")
    about = {"model__task": "classification", "data__partition_by": "domain", "federation__clients": 2}
    targets = {"data__source": str(rows), "lora__target_modules": "auto", "federation__rounds": 1}
    return tiny(tmp_path, model, **about | targets | keys)


def test_a_run_begins_with_the_head_of_its_base(classifier: Path, tmp_path: Path) -> None:
    _, result = run_locally(of_labels(tmp_path, classifier))
    assert result["head"] == "the model's own head: 2 classes"
    assert result["targets"] == "query x2, value x2"
    assert result["baseline"]["loss"] == pytest.approx(8, abs=0.5)  # half of the rows are of class 0, and cost 16
    assert result["baseline"]["accuracy"] == pytest.approx(0.5, abs=0.3)


def test_a_run_begins_with_a_fresh_head_where_that_is_asked_for(classifier: Path, tmp_path: Path) -> None:
    _, result = run_locally(of_labels(tmp_path, classifier, model__head="fresh"))
    assert result["head"] == "a fresh head: model.head = 'fresh'"
    assert result["baseline"]["loss"] == pytest.approx(0.693, abs=0.1)  # ln 2


def test_the_adapter_of_a_run_that_kept_the_head_holds_it(classifier: Path, tmp_path: Path) -> None:
    folder, _ = run_locally(of_labels(tmp_path, classifier, train__lr=0.0))
    plain = AutoModelForSequenceClassification.from_pretrained(classifier).classifier
    saved = read_adapter(folder / "adapter").tensors
    assert torch.equal(saved["classifier.bias"], plain.bias)
    assert torch.equal(saved["classifier.weight"], plain.weight)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"data__max_length": 300}, ConfigError, "data.max-length = 300, but .*gpt2 has positions for at most 256"),
        ({"lora__target_modules": "wte"}, ModelError, "lora.target-modules = 'wte': it is of class Embedding"),
        ({"lora__rank_pattern": "cattn=2"}, ConfigError, "lora.rank-pattern: 'cattn' .*; did you mean 'c_attn'"),
    ],
)
def test_what_the_base_cannot_do_is_said_before_the_first_round(tmp_path: Path, keys, error, words) -> None:
    config = tiny(tmp_path, save_gpt2(tmp_path / "gpt2"), **{"lora__target_modules": "c_attn", **keys})
    with pytest.raises(error, match=words):
        simulation.in_process(config)
    record = folder_of(config) / "result.json"
    assert not record.exists() or not json.loads(record.read_text())["rounds"]


def test_fedlora_data_lists_what_lora_goes_to(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(of_labels(tmp_path, classifier)), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fedlora", "data", str(preset)])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "targets: query x2, value x2\n" in shown
    assert "head: the model's own head: 2 classes\n" in shown


@pytest.mark.parametrize("server", [True, False])
def test_an_encoder_is_refused_once_before_anybody_trains(tmp_path: Path, tiny_bert: Path, server: bool) -> None:
    """It sees what it is to predict; where the server evaluates nothing, the clients alone would hold the base."""
    folder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    with quiet():
        BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    config = tiny(
        tmp_path,
        folder,
        lora__target_modules="auto",
        data__form="text",
        data__text_column="prompt",
        evaluate__server=server,
    )
    with pytest.raises(ModelError, match="predicts a token from later ones too"):
        simulation.in_process(config)
    assert not folder_of(config).exists()
