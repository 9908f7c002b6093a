"""What an image processor of transformers makes of an image, in two parts: pixels of 8 bits, and a scale for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

_ERROR = 1e-4  # largest difference from the processor's own values, which are a few units large
_TRIED = ((48, 80), (80, 48))  # width and height of the images with which a processor is tried


@dataclass(frozen=True, eq=False)
class Frame:
    """The pixels of an image [3, height, width] in 8 bits become the model's input as `pixels * scale + shift`.

    The parts are kept apart, since the pixels of 8 bits take a quarter of the memory.

    Args:
        shape: the shape of every image's pixels.
        scale, shift: fp32 [3], for each channel.
        keeps: whether an image of this size already stays as it is.
    """

    shape: tuple[int, ...]
    scale: np.ndarray
    shift: np.ndarray
    keeps: bool


@lru_cache(maxsize=4)
def frame_of(processor: Any) -> Frame:
    """What a processor does to every image, found by a trial with two images of different sizes.

    Raises:
        ModelError: it makes images of different sizes, or does more than resize, crop, scale and normalize them.
    """
    from PIL import Image

    draw = np.random.default_rng(0)
    tried = [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in _TRIED]
    name = type(processor).__name__
    try:
        found = [_processed(image, processor) for image in tried]
        wanted = [np.asarray(processor(images=[image])["pixel_values"][0]) for image in tried]
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean = np.array(processor.image_mean if processor.do_normalize else [0.0] * 3)
        std = np.array(processor.image_std if processor.do_normalize else [1.0] * 3)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"model.name: its {name} cannot make pixels of an image ({reason}); use the image processor that was saved "
            "with the model"
        ) from error
    if found[0].shape != found[1].shape:
        raise ModelError(
            f"model.name: its {name} makes images of {list(found[0].shape)} and of {list(found[1].shape)}, expected "
            "one size for all; let its preprocessor_config.json resize to height and width, or crop"
        )
    scale, shift = (factor / std).astype(np.float32), (-mean / std).astype(np.float32)
    if found[0].ndim != 3 or any(
        pixels.shape != values.shape or np.abs(pixels * _wide(scale) + _wide(shift) - values).max() > _ERROR
        for pixels, values in zip(found, wanted, strict=True)
    ):
        raise ModelError(
            f"model.name: its {name} does more to an image than to resize, crop, scale and normalize it; use a model "
            "with another image processor"
        )
    again = Image.fromarray(found[0].transpose(1, 2, 0))
    return Frame(found[0].shape, scale, shift, np.array_equal(_processed(again, processor), found[0]))


def resized(image: Image, processor: Any) -> np.ndarray:
    """An image in RGB as pixels of 8 bits [3, height, width], resized and cropped by the processor.

    The processor is not called for an image that it would leave as it is: a call takes longer than a small model.
    """
    frame = frame_of(processor)
    if frame.keeps and image.size == frame.shape[:0:-1]:
        return np.array(image).transpose(2, 0, 1)  # a copy, which torch may write to
    return _processed(image, processor)


def _processed(image: Image, processor: Any) -> np.ndarray:
    return np.asarray(processor(images=[image], do_rescale=False, do_normalize=False)["pixel_values"][0]).astype(
        np.uint8
    )


def _wide(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]
