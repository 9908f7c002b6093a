"""The planted regression: its best adapter, its metric, and a model that reads each text once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import ConfigError, ModelError
from fedlora.config import Config, parse, read_toml
from fedlora.data import encode, load_rows, prepare
from fedlora.models import adapted
from fedlora.tasks.planted import Planted
from fedlora.tasks.predict import predict
from fedlora.tasks.registry import check_task, task_of
from fedlora.trained.embedding import embed
from tests.federation import run_locally

PRESET = Path(__file__).resolve().parents[2] / "configs" / "planted.toml"


def preset(model, folder, options: str = "rank=4, width=12", **keys) -> Config:
    """The preset on a tiny encoder."""
    about = {
        "model.name": str(model),
        "model.task-options": options,
        "lora.rank": 4,
        "run.dir": str(folder),
        "run.id": "one",
    }
    return parse(about | {"data.heldout-max": 40} | keys, parse(read_toml(PRESET)))


@pytest.mark.parametrize("options", [{}, {"shift": 0.7}, {"halvings": 3, "decay": 0.0}])
def test_the_mean_change_is_what_least_squares_finds_over_all_groups_and_texts(options):
    task = Planted(labels=6, width=10, rank=8, **options)
    changes = task.changes(24).double()
    texts = torch.randn(50, 24, dtype=torch.float64)  # the same texts in every group
    wanted = torch.cat([texts @ change.T for change in changes])
    best = torch.linalg.lstsq(texts.repeat(6, 1), wanted).solution.T
    torch.testing.assert_close(best, changes.mean(dim=0), atol=1e-6, rtol=1e-6)


def test_groups_have_the_directions_and_the_differences_that_they_are_said_to_have():
    halved = Planted(labels=6, width=10, rank=8, halvings=4, decay=1.0).changes(24)
    assert torch.linalg.matrix_rank(halved).tolist() == [8, 4, 2, 1, 8, 4]
    values = torch.linalg.svdvals(halved[0])
    torch.testing.assert_close(values[:8] / values[0], 1 / torch.arange(1.0, 9.0))
    torch.testing.assert_close(torch.linalg.svdvals(halved[2])[:2], values[:2])
    plain, shifted = (Planted(labels=6, width=10, rank=8, shift=shift).changes(24) for shift in (0.0, 0.5))
    own = shifted - plain
    assert own.flatten(1).norm(dim=1).square().mean().sqrt() == pytest.approx(0.5 * plain[0].norm())
    torch.testing.assert_close(own.sum(dim=0), torch.zeros(10, 24), atol=1e-5, rtol=0)


def test_the_distance_is_1_untouched_and_0_at_the_planted_change(tiny_bert, tmp_path):
    config = preset(tiny_bert, tmp_path)
    task = task_of(config.model)
    model = adapted.adapted_model(config.model, config.lora)
    examples = encode(prepare(config).heldout, model.base.tokenizer, config.data, task)

    def distance(adapter: AdapterState) -> float:
        adapted.install(model, adapter)
        return task.scores(predict(task, model.model, examples, 16, model.base.pad_id))["distance"]

    (name,) = model.layers
    d_in = model.base.model.config.hidden_size
    untouched = adapted.untouched(model, {})
    scaling = untouched.lora[name].scaling
    left, values, right = torch.linalg.svd(task.changes(d_in).mean(dim=0), full_matrices=False)
    for share in (0.0, 1.0):
        factors = LoraFactors(right[:4], share / scaling * left[:, :4] * values[:4], scaling)
        assert distance(replace(untouched, lora={name: factors})) == pytest.approx(1 - share, abs=1e-4)


def test_features_are_the_encoders_and_a_text_is_read_once(tiny_bert, tmp_path):
    config = preset(tiny_bert, tmp_path)
    model = adapted.adapted_model(config.model, config.lora)
    texts = load_rows(config.data)["text"][:3]
    tokens = model.base.tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    (found,) = model.model(**batch).hidden_states
    torch.testing.assert_close(found, embed(texts, str(tiny_bert)) * found.shape[1] ** 0.5, atol=1e-4, rtol=1e-4)
    probed, calls = model.base.model, []
    handle = probed.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        model.model.train()
        (again,) = model.model(**batch).hidden_states
    finally:
        handle.remove()
    assert not calls
    assert torch.equal(again, found)
    probed._known.clear()
    (last,) = model.model(**{name: each[-1:] for name, each in batch.items()}).hidden_states
    assert torch.equal(last[0], found[-1])  # whatever texts are beside it


def test_groups_of_no_client_are_not_looked_at(tmp_path):
    config = preset(tmp_path / "none", tmp_path)
    rows = load_rows(config.data)
    assert len(set(rows["group"])) > config.federation.clients
    task_of(config.model).check_rows(rows, config.data)


def test_a_run_comes_nearer_to_the_planted_change(tiny_bert, tmp_path):
    keys = {"train.steps": 20, "federation.rounds": 3, "train.lr": 0.02}
    _, result = run_locally(preset(tiny_bert, tmp_path, **keys))
    distances = [entry["heldout"]["distance"] for entry in result["rounds"]]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9


def test_a_rank_beyond_the_encoders_features_is_one_sentence(tiny_bert, tmp_path):
    config = preset(tiny_bert, tmp_path, "rank=400, width=500")
    with pytest.raises(ModelError, match=r"features, too few for a change of rank 400; lower the rank"):
        adapted.adapted_model(config.model, config.lora)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.source": "sentiment"}, "data.source = 'sentiment', expected 'planted'"),
        ({"lora.target-modules": "auto"}, "lora.target-modules = 'auto', expected 'probe'"),
        ({"model.quantization": "nf4"}, "model.quantization = 'nf4', expected 'none'"),
        ({"federation.clients": 3}, "model.labels = 4, expected 3"),
        ({"model.task-options": "rank=300"}, "expected 1 <= rank <= width"),
    ],
)
def test_a_wrong_key_is_one_sentence_before_anything_is_loaded(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_task(preset(tmp_path / "none", tmp_path, **keys))
