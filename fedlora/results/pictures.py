"""Images as characters, for a terminal."""

from __future__ import annotations

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

_WIDTH = 48  # largest number of characters in a line
_SHADES = " ░▒▓█"


def picture_text(picture: np.ndarray, *, colours: bool) -> Text:
    """An image in characters: two pixels, one above the other, for each; the image is at most 48 characters wide.

    Args:
        picture: uint8 [height, width, 3].
        colours: whether the terminal shows colours; without, a character's shade is the mean of its pixels.
    """
    height, width = picture.shape[:2]
    wide = min(width, _WIDTH)
    small = Image.fromarray(picture).resize((wide, max(2, round(height * wide / width / 2) * 2)), Image.Resampling.BOX)
    pixels = np.asarray(small).astype(int)
    text = Text(style="not dim")
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(above, below, strict=True):
            if colours:
                text.append("▀", style=Style(color=_colour(top), bgcolor=_colour(bottom)))
            else:
                text.append(_SHADES[int((top.mean() + bottom.mean()) / 2 / 256 * len(_SHADES))])
        text.append("\n")
    return text


def _colour(pixel: np.ndarray) -> Color:
    return Color.from_rgb(*map(int, pixel))
