"""Classification from a frozen encoder's features: its logits, what is learned, and keys that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm

from fedlora.adapters import LoraFactors
from fedlora.common.errors import ConfigError
from fedlora.config import Config, parse, read_toml
from fedlora.data import encode, prepare
from fedlora.models import adapted
from fedlora.tasks.frozen_encoder import readout
from fedlora.tasks.predict import predict
from fedlora.tasks.probed import original
from fedlora.tasks.registry import check_task, task_of
from tests.federation import run_locally

PRESET = Path(__file__).resolve().parents[2] / "configs" / "sentiment.toml"


def preset(model, folder, options: str = "width=12", **keys) -> Config:
    """The sentiment preset on a tiny encoder that is frozen."""
    about = {
        "model.name": str(model),
        "model.task": "frozen-encoder",
        "model.task-options": options,
        "model.compute-dtype": "fp32",
        "lora.target-modules": "probe",
        "lora.rank": 4,
        "data.heldout-max": 60,
        "run.dir": str(folder),
        "run.id": "one",
    }
    return parse(about | keys, parse(read_toml(PRESET)))


def test_the_logits_are_the_readout_of_the_hidden_layer(tiny_bert, tmp_path):
    config = preset(tiny_bert, tmp_path)
    task, model = task_of(config.model), adapted.adapted_model(config.model, config.lora)
    examples = encode(prepare(config).heldout, model.base.tokenizer, config.data, task)[:5]
    (name,) = model.layers
    d, scaling = model.base.model.config.hidden_size, adapted.untouched(model, {}).lora[name].scaling
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, d, generator=draw), torch.randn(12, 4, generator=draw)
    adapted.install(model, replace(adapted.untouched(model, {}), lora={name: LoraFactors(A, B, scaling)}))
    batch = task.collate(examples, model.base.pad_id)
    (x,) = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).hidden_states
    logits, targets, _ = task.logits(model.model, batch)
    weight = (original(12, d) + scaling * B @ A).double().numpy()
    hidden = x.detach().double().numpy() @ weight.T
    expected = (hidden * norm.cdf(hidden)) @ readout(2, 12).double().numpy().T
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4)
    assert targets.tolist() == [example["labels"] for example in examples]
    found = predict(task, model.model, examples, 5, model.base.pad_id)
    assert found.predicted[found.rows.argsort()].tolist() == expected.argmax(axis=1).tolist()


def test_the_readout_is_orthonormal_and_the_same_everywhere():
    C = readout(3, 10)
    torch.testing.assert_close(C @ C.T, torch.eye(3))
    readout.cache_clear()
    assert torch.equal(readout(3, 10), C)


def test_a_run_learns_by_the_adapter_alone(tiny_bert, tmp_path):
    keys = {"train.steps": 20, "federation.rounds": 3, "train.lr": 0.05, "data.client-max": 200}
    folder, result = run_locally(preset(tiny_bert, tmp_path, **keys))
    parts = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in parts} == {"probe"}  # no head
    losses = [entry["train-loss"] for entry in result["rounds"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora.target-modules": "query"}, "lora.target-modules = 'query', expected 'probe', since the encoder is"),
        ({"data.label-names": "a, b, c"}, "names 3 classes, but model.labels = 2"),
        ({"model.task-options": "width=1"}, "expected a width of at least model.labels = 2"),
    ],
)
def test_a_wrong_key_is_one_sentence_before_anything_is_loaded(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_task(preset(tmp_path / "none", tmp_path, **keys))
