"""MLP-Mixer against a few lines of its own, read from a folder, and trained in federations on every base."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from fedlora.common.errors import ModelError
from fedlora.config import ModelConfig
from fedlora.data import encode, prepare
from fedlora.models import adapted, find_targets, load_base, meta_model
from fedlora.models.mixer import MlpMixerConfig, MlpMixerForImageClassification
from fedlora.models.peft_files import read_adapter
from fedlora.models.per_example import check_rows
from tests.clients.training.test_cohort import random_adapter
from tests.clients.training.test_private import assert_rows, at_once, one_at_a_time
from tests.device import model_config
from tests.federation import run_locally
from tests.tasks.test_image_classification import config_of, write_pictures
from tests.tiny import image_processor

LEAVES = ("token_in", "token_out", "channel_in", "channel_out")


def save_mixer(folder: Path, **sizes: Any) -> Path:
    """A mixer for images of 16 x 16 with a head of two classes: 2 blocks, hidden 32, patches of 4."""
    own = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "token_size": 24}
    config = MlpMixerConfig(**(own | {"channel_size": 64, "initializer_range": 0.2} | sizes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MlpMixerForImageClassification(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixer(tmp_path_factory) -> Path:
    return save_mixer(tmp_path_factory.mktemp("models") / "tiny-mixer")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def by_hand(w: dict[str, Tensor], images: Tensor, patch: int, blocks: int) -> Tensor:
    """The equations of arXiv 2105.01601 on patches that are cut out by hand."""
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # rows, channels, down, across, height, width
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = cut @ w["mixer.patches.weight"].flatten(1).T + w["mixer.patches.bias"]

    def norm(y: Tensor, name: str) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    for number in range(blocks):
        at = f"mixer.blocks.{number}"
        inner = torch.einsum("ntc,kt->nkc", norm(x, f"{at}.token_norm"), w[f"{at}.token_in.weight"])
        inner = F.gelu(inner + w[f"{at}.token_in.bias"][:, None])
        x = x + torch.einsum("nkc,tk->ntc", inner, w[f"{at}.token_out.weight"]) + w[f"{at}.token_out.bias"][:, None]
        inner = F.gelu(norm(x, f"{at}.channel_norm") @ w[f"{at}.channel_in.weight"].T + w[f"{at}.channel_in.bias"])
        x = x + inner @ w[f"{at}.channel_out.weight"].T + w[f"{at}.channel_out.bias"]
    return norm(x, "mixer.norm").mean(1) @ w["classifier.weight"].T + w["classifier.bias"]


def test_the_logits_are_those_of_the_papers_equations(mixer):
    model = AutoModelForImageClassification.from_pretrained(mixer)
    assert type(model) is MlpMixerForImageClassification
    generator = torch.Generator().manual_seed(1)
    weights = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    model.load_state_dict(weights)  # so that biases and norms are not zeros and ones
    images = torch.randn(3, 3, 16, 16, generator=generator)
    with torch.no_grad():
        found = model(pixel_values=images, labels=torch.tensor([0, 1, 1]))
    expected = by_hand(weights, images, patch=4, blocks=2)
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected, torch.tensor([0, 1, 1])), atol=1e-5, rtol=1e-4)


def test_a_folder_is_read_as_it_was_saved_and_shapes_need_no_weights(mixer, tmp_path):
    config = ModelConfig(name=str(mixer), task="image-classification", labels=2, quantization="none")
    model = load_base(config).model
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    shapes = meta_model(config)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert find_targets(shapes, "auto", ["classifier"]) == tuple(
        f"mixer.blocks.{number}.{leaf}" for number in range(2) for leaf in LEAVES
    )


def test_images_of_another_size_are_one_sentence(tmp_path):
    folder = save_mixer(tmp_path / "mixer", image_size=32)
    config = ModelConfig(name=str(folder), task="image-classification", labels=2, quantization="none")
    with pytest.raises(ModelError, match=r"images of 16 x 16 pixels, expected 32 x 32"):
        load_base(config)
    with pytest.raises(ValueError, match="image_size = 30 is no multiple of patch_size = 4"):
        save_mixer(tmp_path / "other", image_size=30)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_run_learns(tmp_path, mixer, pictures, quantization):
    keys: dict[str, Any] = {"train__steps": 8, "train__lr": 0.02, "train__batch_size": 4}
    folder, result = run_locally(config_of(tmp_path, mixer, pictures, model__quantization=quantization, **keys))
    assert result["rounds"][-1]["heldout"]["loss"] < 0.7 * result["baseline"]["loss"]
    found = read_adapter(folder / "adapter")
    assert {name.rsplit(".", 1)[-1] for name in found.lora} == {*LEAVES}
    assert all(factors.B.norm() > 0 for factors in found.lora.values())


def test_the_code_in_an_exports_card_loads_it_in_a_fresh_process(tmp_path, mixer, pictures, command):
    folder, _ = run_locally(config_of(tmp_path, mixer, pictures, federation__rounds=1))
    code = "import torch\nimages = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)\n"
    for name, option in (("adapter", []), ("merged", ["--merge"])):
        assert command("export", folder, tmp_path / name, *option)[0] == 0
        card = (tmp_path / name / "README.md").read_text()
        code += card.split("```python\n")[1].split("```")[0] + "print(model.eval()(images).logits.tolist())\n"
    (tmp_path / mixer.name).symlink_to(mixer)  # the card names a local base by the last part of its path
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    beside, merged = (torch.tensor(json.loads(line)) for line in done.stdout.splitlines())
    assert torch.allclose(beside, merged, atol=1e-4)
    assert "import fedlora.models.mixer" in code


def test_gradient_checkpointing_changes_nothing(tmp_path, mixer, pictures):
    losses = []
    for often in (False, True):
        folder = tmp_path / str(often)
        folder.mkdir()
        keys: dict[str, Any] = {"model__gradient_checkpointing": often, "federation__rounds": 1}
        losses.append(run_locally(config_of(folder, mixer, pictures, **keys))[1]["rounds"][-1]["heldout"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_of_clients_trains_each_as_alone(tmp_path, mixer, pictures, sizes):
    adapters = []
    for company in ("1", "2"):
        folder = tmp_path / company
        folder.mkdir()
        keys: dict[str, Any] = {"train__clients_at_once": company}
        found = read_adapter(run_locally(config_of(folder, mixer, pictures, **keys))[0] / "adapter")
        updates = {name: factors.scaling * factors.B @ factors.A for name, factors in found.lora.items()}
        adapters.append(updates | found.tensors)
    assert 2 in sizes
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=2e-5, rtol=1e-4)


def test_gradients_of_rows_are_those_of_one_row_at_a_time(mixer, pictures, tmp_path):
    """Also in the layers of tokens, which get [rows, channels, tokens]."""
    config = config_of(tmp_path, mixer, pictures)
    bench = adapted.adapted_model(replace(model_config(mixer), task="image-classification", labels=2), config.lora)
    check_rows(bench)
    trained = adapted.install(bench, random_adapter(bench, config.lora, 3, 0), "AB")
    data = encode(prepare(config).heldout, bench.base.tokenizer, config.data, bench.task)[:5]
    found = at_once(bench, data)
    assert {name.rsplit(".", 2)[-2] for name in found} == {*LEAVES, "classifier"}
    assert_rows(found, one_at_a_time(bench, trained, data))
    adapted.forget()
