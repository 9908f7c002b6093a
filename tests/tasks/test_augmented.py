"""Augmentation: images of training rows alone change, by the client's own seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.common.errors import ConfigError
from fedlora.models.peft_files import read_adapter
from fedlora.tasks import augmented as module
from fedlora.tasks.augmented import NAMES, augmented
from fedlora.tasks.registry import check_task
from tests.federation import run_locally, tiny
from tests.tasks.test_image_classification import config_of, pictures  # noqa: F401 - a fixture

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 3, 12, 12), dtype=np.uint8)


def test_flip_mirrors_some_images_and_leaves_the_others():
    found = augmented(IMAGES, "flip", 3)
    same = [np.array_equal(new, old) for new, old in zip(found, IMAGES, strict=True)]
    mirrored = [np.array_equal(new, old[..., ::-1]) for new, old in zip(found, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(same) < len(IMAGES)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_images_and_another_seed_others(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = augmented(IMAGES, name, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.dtype, first.shape) == (IMAGES.dtype, IMAGES.shape)
    np.testing.assert_array_equal(first, augmented(IMAGES, name, 1))
    assert not np.array_equal(first, augmented(IMAGES, name, 2))
    assert not np.array_equal(first, IMAGES)


def test_colour_leaves_grey_grey_up_to_saturation_and_erasing_makes_a_rectangle_black():
    white = np.full((32, 3, 12, 12), 255, np.uint8)
    erased = augmented(white, "erase", 0)
    assert {*np.unique(erased)} == {0, 255}
    for image in erased[:, 0]:
        rows, columns = np.nonzero(image == 0)
        assert len(rows) in (0, len(set(rows)) * len(set(columns)))
    grey = np.repeat(IMAGES[:, :1], 3, axis=1)
    changed = augmented(grey, "color", 0).astype(int)
    assert np.abs(changed - changed.mean(axis=1, keepdims=True).round()).max() <= 1


def updates_of(folder):
    found = read_adapter(folder / "adapter")
    return {name: f.scaling * f.B @ f.A for name, f in found.lora.items()} | dict(found.tensors)


def test_a_batch_of_clients_augments_each_as_alone_and_no_held_out_image(tmp_path, tiny_vit, pictures, sizes):  # noqa: F811
    made, scored = [], []
    for name, keys in {
        "plain": {},
        "alone": {"train__augment": "flip, rotate"},
        "together": {"train__augment": "flip, rotate", "train__clients_at_once": "2"},
    }.items():
        (tmp_path / name).mkdir()
        at_once = {"train__clients_at_once": "1"}
        folder, result = run_locally(config_of(tmp_path / name, tiny_vit, pictures, **(at_once | keys)))
        made.append(updates_of(folder))
        scored.append(result["baseline"])
    assert 2 in sizes
    assert scored[0] == scored[1] == scored[2]
    for name, value in made[1].items():
        torch.testing.assert_close(made[2][name], value, atol=2e-5, rtol=1e-4)
    assert any(not torch.allclose(made[0][name], value, atol=1e-4) for name, value in made[1].items())


def test_what_does_not_fit_is_one_sentence(tmp_path, tiny_vit, tiny_llama, pictures, monkeypatch):  # noqa: F811
    with pytest.raises(ConfigError, match="unknown augmentation 'flipp'; did you mean 'flip'"):
        check_task(config_of(tmp_path, tiny_vit, pictures, train__augment="flipp"))
    with pytest.raises(ConfigError, match=r"changes images, but model.task = 'causal-lm' reads none; remove it"):
        check_task(tiny(tmp_path, tiny_llama, train__augment="flip"))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the library kornia; install it: pip install 'fedlora\[images\]'"):
        check_task(config_of(tmp_path, tiny_vit, pictures, train__augment="flip"))
