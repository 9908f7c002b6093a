"""Images in rows: how they are opened, decoded and made RGB."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .conversations import RowError, described

if TYPE_CHECKING:
    from PIL import Image

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)
_DEEP = 65535  # the largest value of 16 bits
_OTHER_KIND = "no image of a kind that can be read; save it as PNG or JPEG, or drop this row"


def looked_at(cell: Any) -> str:
    """The reason why a cell has no image to predict a class for; empty if it has one. Only the image's head is read.

    Args:
        cell: an image as its file's bytes, or as {"bytes", "path"}, where one of the two may be missing.

    Raises:
        RowError: there is something else, or it is not an image that can be read.
    """
    if cell is None or (isinstance(cell, dict) and cell.get("bytes") is None and not cell.get("path")):
        return "no image"
    with _opened(cell):
        return ""


def decoded(cell: Any) -> Image.Image:
    """The image in RGB, upright as its EXIF data say.

    Grey values of 16 bits become 8 bits of the whole range, 0 to 65535. What is transparent is seen before white.

    Args:
        cell: as in `looked_at`.

    Raises:
        RowError: the image cannot be decoded.
    """
    from PIL import ImageOps

    with _opened(cell) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except NotImplementedError:
            raise RowError(_OTHER_KIND) from None
        except _BROKEN:
            raise RowError("an image that is cut off or damaged; put back the whole file, or drop this row") from None
        return to_rgb(upright)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB.

    Raises:
        RowError: its values are fractions, or have more than 16 bits.
    """
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _DEEP:
            raise RowError("an image with values beyond 16 bits, expected 0 to 65535; convert it")
        return Image.fromarray(((values * 255 + _DEEP // 2) // _DEEP).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise RowError("an image of fractions, expected whole numbers of 8 or 16 bits; convert it")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(cell: Any) -> Iterator[Image.Image]:
    """The image of a cell, of which pillow has read the head alone."""
    from PIL import Image, UnidentifiedImageError

    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if not isinstance(content, bytes) and not (content is None and isinstance(path, str)):
        raise RowError(f"{described(cell)}, expected an image: its file's bytes, or {{'bytes', 'path'}} as on the hub")
    if content == b"" or (content is None and Path(str(path)).is_file() and not Path(str(path)).stat().st_size):
        raise RowError("an empty image, of 0 bytes; put back the file, or drop this row")
    try:
        image = Image.open(str(path) if content is None else io.BytesIO(content))
    except (UnidentifiedImageError, NotImplementedError):
        raise RowError(_OTHER_KIND) from None
    except FileNotFoundError:
        raise RowError("an image whose file is not there; put it back, or drop this row") from None
    except Image.DecompressionBombError:
        raise RowError("an image of more pixels than pillow takes for safe; scale it down") from None
    except _BROKEN:
        raise RowError("an image that is cut off or damaged; put back the whole file, or drop this row") from None
    with image:
        yield image
