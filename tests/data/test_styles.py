"""The styles of pictures: against plain filters, the same each time, and as six disjoint domains of a set."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fedlora.config import DataConfig
from fedlora.data import load_rows, sources, split_rows
from fedlora.data.images import decoded
from fedlora.data.styles import STYLES, blur, edges, inverted, low_contrast, rotation, texture
from tests.data.test_images import drawn, idx

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
# The beginnings of the checksums of the styled images
KNOWN = {
    "inverted": "71153f05c7df",
    "edges": "4e0f4fd6dc09",
    "blur": "e1f73eb65c1b",
    "rotation": "d8a716f2fb4c",
    "texture": "930fb604eae5",
    "low contrast": "e3858bafbc49",
}


def test_styles_are_what_plain_filters_give():
    values = IMAGES.astype(float)
    across, down = (np.array([ndimage.sobel(one, axis, mode="nearest") for one in values]) for axis in (0, 1))
    assert np.array_equal(edges(IMAGES), ((abs(across) + abs(down)) // 3).clip(0, 255))
    weights = np.array([1, 6, 15, 20, 15, 6, 1]) / 64
    smooth = ndimage.convolve(values, np.multiply.outer(weights, weights)[None], mode="constant")
    assert np.array_equal(blur(IMAGES), np.floor(smooth + 1e-9))
    assert np.array_equal(inverted(IMAGES), 255 - values)
    assert np.array_equal(rotation(IMAGES), [np.rot90(image) for image in IMAGES])
    assert np.array_equal(low_contrast(IMAGES), 102 + IMAGES // 5)


def test_a_texture_lies_over_the_image_and_is_each_images_own():
    black, white = (np.full((2, 30, 28), value, np.uint8) for value in (0, 255))
    cloth = texture(black)
    assert {*np.unique(texture(white).astype(int) - cloth)} <= {159, 160}  # 5/8 of 255, rounded down
    squares = cloth[:, :28].reshape(2, 7, 4, 7, 4)
    assert np.array_equal(squares, np.broadcast_to(squares[:, :, :1, :, :1], squares.shape))
    assert not np.array_equal(cloth[0], cloth[1])
    assert 30 < cloth.mean() < 65
    assert not np.array_equal(texture(black, seed=1), cloth)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_the_same_bytes_each_time_and_on_every_machine(name):
    made = STYLES[name](IMAGES)
    assert (made.dtype, made.shape) == (np.uint8, IMAGES.shape)
    assert hashlib.sha256(made.tobytes()).hexdigest()[:12] == KNOWN[name]


@pytest.fixture
def clothes(tmp_path, monkeypatch) -> Path:
    """Fashion-MNIST with 240 random images."""
    images, labels = drawn(0, (240, 28, 28)), np.arange(240, dtype=np.uint8) % 10
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    return tmp_path


def test_each_domain_has_images_of_its_own_that_no_packaged_model_was_trained_on(clothes):
    data = DataConfig(source="fashion-domains", partition="natural")
    rows = load_rows(data)
    assert rows["domain"] == [name for name in STYLES for _ in range(20)]
    assert rows["label"] == [number % 10 for number in range(120, 240)]
    assert rows.features["label"].names[0] == "T-shirt/top"
    for at, style in enumerate(STYLES.values()):
        own = drawn(0, (240, 28, 28))[120 + 20 * at : 140 + 20 * at]
        found = [np.asarray(decoded(cell))[..., 0] for cell in rows["image"][20 * at : 20 * at + 20]]
        assert np.array_equal(found, style(own))
    split = split_rows(rows, data, 6, seed=0)
    assert sorted(split.names) == sorted(STYLES)
    assert [set(split.client(client)["domain"]) for client in range(6)] == [{name} for name in split.names]


@pytest.mark.slow
def test_the_real_domains_have_all_classes_in_about_equal_parts():
    rows = load_rows(DataConfig(source="fashion-domains"))
    labels, domains = np.array(rows["label"]), np.array(rows["domain"])
    counts = np.array([np.bincount(labels[domains == name], minlength=10) for name in STYLES])
    assert counts.sum(1).tolist() == [5000] * 6
    assert counts.min() > 430
    assert counts.max() < 570
