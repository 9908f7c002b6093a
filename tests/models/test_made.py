"""Models that are made on this machine: what is saved, what each step sees, and how good the real ones are."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from fedlora.common.assets import fetch
from fedlora.config import ModelConfig
from fedlora.data.image_files import read_idx
from fedlora.data.images import to_rgb
from fedlora.models import load_base
from fedlora.models.made import mixer, training, vit
from tests.data.test_images import idx

TINY = {"epochs": 2, "batch_size": 16, "train": 100, "test": 40}


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """A set in the files of Fashion-MNIST: the place of a bright square says the class."""
    folder = tmp_path_factory.mktemp("clothes")
    for name, count in (("train", 120), ("t10k", 60)):
        images = np.random.default_rng(count).integers(0, 60, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6, 10:16] = 250
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def made(recipe: training.Recipe, module: ModuleType, source: Path, folder: Path, monkeypatch) -> list[str]:
    monkeypatch.setattr(module, "_RECIPE", recipe)
    monkeypatch.setattr(training, "_SAY_SECONDS", 0.0)
    said: list[str] = []
    folder.mkdir()
    module.make(source, folder, said.append)
    return said


@pytest.mark.parametrize("module", [vit, mixer])
def test_a_model_is_saved_without_its_last_layer_and_is_the_same_each_time(tmp_path, clothes, monkeypatch, module):
    recipe = training.Recipe("tiny", "7", **TINY)
    before = torch.get_rng_state()
    said = made(recipe, module, clothes, tmp_path / "one", monkeypatch)
    assert torch.equal(torch.get_rng_state(), before)
    assert said[0].startswith("training tiny: step 1 of 12, loss ")
    assert said[-1].startswith("tiny: trained in ")
    about = (tmp_path / "one" / "README.md").read_text()
    assert "version 7, 2 epochs" in about
    assert f"torch {torch.__version__}" in about
    config = ModelConfig(name=str(tmp_path / "one"), task="image-classification", labels=3, quantization="none")
    base = load_base(config)
    assert base.head == "a fresh head: the model has none"
    assert base.model.classifier.weight.shape == (3, 96)
    body = dict(AutoModel.from_pretrained(tmp_path / "one").named_parameters())
    inner = dict(getattr(base.model, base.model.base_model_prefix).named_parameters())
    assert all(torch.equal(body[name], value) for name, value in inner.items())
    made(recipe, module, clothes, tmp_path / "two", monkeypatch)
    made(replace(recipe, seed=1), module, clothes, tmp_path / "other", monkeypatch)
    one, two, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert not any(torch.equal(other[name], value) for name, value in one.items() if value.ndim > 1)


def test_a_model_is_trained_on_what_its_image_processor_makes(tmp_path, clothes, monkeypatch):
    from PIL import Image

    made(training.Recipe("tiny", "1", **TINY), vit, clothes, tmp_path / "model", monkeypatch)
    images, _ = read_idx(clothes / "t10k-images-idx3-ubyte.gz")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    pictures = [to_rgb(Image.fromarray(image)) for image in images[:4]]
    found = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(training.pixels(torch.from_numpy(images[:4].copy())), found, atol=1e-6, rtol=0)


def test_each_image_is_moved_and_mirrored_by_itself():
    images = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (200, 6, 6), dtype=np.uint8))
    moved = training.shifted(images, 1, torch.Generator().manual_seed(0))
    wide = np.pad(images.numpy(), ((0, 0), (1, 1), (1, 1)))
    ways = [
        (down, right, mirrored)
        for number, image in enumerate(moved.numpy())
        for down in range(3)
        for right in range(3)
        for mirrored in (False, True)
        if np.array_equal(image, wide[number, :, :: -1 if mirrored else 1][down : down + 6, right : right + 6])
    ]
    assert len(ways) == 200  # each image is found in exactly one way
    assert len(set(ways)) == 18


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["fashion-vit", pytest.param("fashion-mixer", marks=pytest.mark.nightly)])
def test_the_real_models_tell_the_classes_of_images_that_they_never_saw(name):
    """By the nearest mean of a class's features: the last layer of the training is not there any more."""
    model = AutoModel.from_pretrained(fetch(name), **({"add_pooling_layer": False} if name == "fashion-vit" else {}))

    def features(file: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = read_idx(fetch("fashion-mnist") / file)
        with torch.no_grad():
            tokens = model(pixel_values=training.pixels(torch.from_numpy(images[rows].copy()))).last_hidden_state
        return tokens[:, 0] if name == "fashion-vit" else tokens.mean(1), torch.tensor(labels[rows])

    found, labels = features("train-images-idx3-ubyte.gz", slice(30_000, 31_000))
    means = torch.stack([found[labels == label].mean(0) for label in range(10)])
    found, labels = features("t10k-images-idx3-ubyte.gz", slice(2_000, 3_000))
    assert (torch.cdist(found, means).argmin(1) == labels).float().mean() > 0.75
