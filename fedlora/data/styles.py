"""Six styles of grey images, which stand for domains: the same classes, drawn in six ways.

All arithmetic is on whole numbers, and the random numbers are a bit generator's own words, whose sequence numpy keeps
the same in all versions. The images are therefore the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

Images = np.ndarray  # uint8 [n, height, width]
_GRAIN = 4  # height and width of a square of texture, in pixels


def inverted(images: Images) -> Images:
    """Dark on light instead of light on dark."""
    return 255 - images


def edges(images: Images) -> Images:
    """The outlines: how much the brightness changes from pixel to pixel, across and down (Sobel's filter)."""
    wide = np.pad(images.astype(np.int32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = wide[:, 2:] - wide[:, :-2]
    right = wide[:, :, 2:] - wide[:, :, :-2]
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    right = right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:]
    return _bytes((np.abs(down) + np.abs(right)) // 3)


def blur(images: Images) -> Images:
    """Out of focus: each pixel is a mean over 7 x 7 pixels, nearer ones weighing more (binomial weights)."""
    values = np.pad(images.astype(np.int32), ((0, 0), (3, 3), (3, 3)))
    for _ in range(
        6
    ):  # six times the mean of two neighbours has the weights 1, 6, 15, 20, 15, 6, 1, of which 64 is all
        values = values[:, :-1] + values[:, 1:]
        values = values[:, :, :-1] + values[:, :, 1:]
    return _bytes(values // 4096)


def rotation(images: Images) -> Images:
    """Turned by a quarter, to the left."""
    return np.rot90(images, axes=(1, 2))


def texture(images: Images, seed: int = 0) -> Images:
    """Printed on coarse cloth: squares of random brightness lie over the image and its background.

    Args:
        images: the images.
        seed: seed of the squares, which are drawn for each image apart.
    """
    count, height, width = images.shape
    lines, columns = -(-height // _GRAIN), -(-width // _GRAIN)
    words = np.random.PCG64(seed).random_raw(count * lines * columns)
    squares = (words >> np.uint64(56)).astype(np.int32).reshape(count, lines, columns)
    cloth = squares.repeat(_GRAIN, 1).repeat(_GRAIN, 2)[:, :height, :width]
    return _bytes((5 * images.astype(np.int32) + 3 * cloth) // 8)


def low_contrast(images: Images) -> Images:
    """In fog: a fifth of the range of brightness is left, around a middle grey."""
    return _bytes(images.astype(np.int32) // 5 + 102)


STYLES: Mapping[str, Callable[[Images], Images]] = MappingProxyType(
    {
        "inverted": inverted,
        "edges": edges,
        "blur": blur,
        "rotation": rotation,
        "texture": texture,
        "low contrast": low_contrast,
    }
)


def _bytes(values: np.ndarray) -> Images:
    return values.clip(0, 255).astype(np.uint8)
