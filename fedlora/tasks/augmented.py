"""Training images changed at random: flipped, cropped, turned, in other colours. The library kornia changes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedlora.common.errors import ConfigError, suggest

# How kornia makes each change, from (kornia.augmentation, height, width); the values are usual ones for photographs.
_MAKERS: Mapping[str, Callable[[Any, int, int], Any]] = MappingProxyType(
    {
        "flip": lambda library, height, width: library.RandomHorizontalFlip(p=0.5),
        "crop": lambda library, height, width: library.RandomResizedCrop((height, width), scale=(0.6, 1.0)),
        "rotate": lambda library, height, width: library.RandomRotation(15.0, p=1.0),
        "color": lambda library, height, width: library.ColorJiggle(0.2, 0.2, 0.2, 0.05, p=1.0),
        "erase": lambda library, height, width: library.RandomErasing(p=0.5),
    }
)
NAMES = tuple(_MAKERS)


def names_of(text: str) -> tuple[str, ...]:
    """The names in `train.augment`, in their order.

    Raises:
        ConfigError: a name is unknown, or kornia is not installed.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            raise ConfigError(
                f"train.augment: unknown augmentation {name!r}{suggest(name, NAMES)}; expected some of "
                f"{', '.join(NAMES)}"
            )
    if names and find_spec("kornia") is None:
        raise ConfigError(
            f"train.augment = {text!r} needs the library kornia; install it: pip install 'fedlora[images]'"
        )
    return names


def augmented(pixels: np.ndarray, text: str, seed: int) -> np.ndarray:
    """Images changed at random, each in its own way.

    Args:
        pixels: uint8 [n, 3, height, width].
        text: `train.augment`.
        seed: the same seed changes the same images in the same way; torch's own generator is left as it was.

    Returns:
        uint8 [n, 3, height, width].
    """
    change = _changes(text, *pixels.shape[2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = change(torch.from_numpy(pixels).float() / 255)
    return (changed * 255).round().clamp(0, 255).to(torch.uint8).numpy()


@lru_cache(maxsize=4)
def _changes(text: str, height: int, width: int) -> Any:
    names = names_of(text)
    from kornia import augmentation as library

    made = (_MAKERS[name](library, height, width) for name in names)
    return library.AugmentationSequential(*made, data_keys=["input"])
