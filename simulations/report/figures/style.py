"""One colour, marker and dash for each strategy, in every figure.

Colours are those of Okabe and Ito and Paul Tol's muted ones, which colour-blind readers can distinguish. Markers and
dashes distinguish strategies without any colour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

Dash = tuple[float, ...]

_SOLID: Dash = ()
_DASHED: Dash = (5, 2)
_DOTTED: Dash = (1, 1.5)
_DASHDOT: Dash = (6, 2, 1, 2)
# Markers that cover less of their square are drawn larger; some are strokes without a face.
_SIZES = {
    "*": 9.0,
    "P": 6.8,
    "X": 6.8,
    "p": 6.4,
    "h": 6.0,
    "8": 5.6,
    "d": 6.4,
    "^": 6.0,
    "v": 6.0,
    "<": 6.0,
    ">": 6.0,
    "|": 8.0,
}
_STROKES = frozenset("x+|")


@dataclass(frozen=True)
class Style:
    """The style in which one label is drawn.

    Args:
        color: the colour, as #rrggbb.
        marker: Matplotlib's name of the marker.
        dash: lengths of dashes and gaps, in line widths; empty: a solid line.
    """

    color: str
    marker: str
    dash: Dash

    @property
    def line(self) -> str | tuple[float, Dash]:
        """Matplotlib's `linestyle`."""
        return (0, self.dash) if self.dash else "-"

    @property
    def plot(self) -> dict[str, Any]:
        """Keywords of Matplotlib's `plot`: a line with markers that a thin white edge sets off."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "markersize": _SIZES.get(self.marker, 5.0),
            "markeredgecolor": self.color if self.marker in _STROKES else "white",
            "markeredgewidth": 1.2 if self.marker in _STROKES else 0.3,
        }


KNOWN: dict[str, Style] = {
    "fedavg": Style("#000000", "o", _SOLID),
    "fedavg-zeropad": Style("#777777", "s", _DASHED),
    "rblora": Style("#E69F00", "^", _SOLID),
    "hetlora": Style("#56B4E9", "v", _DASHED),
    "flexlora": Style("#009E73", "D", _SOLID),
    "flora": Style("#0072B2", "P", _SOLID),
    "fedex": Style("#D55E00", "X", _DASHED),
    "florist": Style("#CC79A7", "*", _SOLID),
    "lora-fair": Style("#882255", "<", _DASHDOT),
    "ffa": Style("#999933", ">", _DASHED),
    "rolora": Style("#332288", "h", _DOTTED),
    "fedsvd": Style("#44AA99", "p", _DASHDOT),
    "fedsa": Style("#AA4499", "d", _DOTTED),
    "fedsb": Style("#117733", "8", _DASHDOT),
    "abmll": Style("#661100", "o", _DASHDOT),
    "fedrot": Style("#6699CC", "^", _DASHED),
    "raflora": Style("#994455", "v", _SOLID),
    "frlora": Style("#EE8866", "s", _SOLID),
    "fed-plora": Style("#225555", "D", _DASHED),
    "flasc": Style("#999933", "h", _DASHDOT),
    "fslora": Style("#661100", "s", _DOTTED),
    "lora-a2": Style("#332288", "P", _DASHED),
    "base": Style("#555555", "x", _DOTTED),
    "local": Style("#555555", "+", _DASHED),
    "centralised": Style("#555555", "|", _DASHDOT),
}
_COLORS = sorted({style.color for style in KNOWN.values()})
_MARKERS = ["o", "s", "^", "v", "D", "P", "X", "*", "<", ">", "h", "p", "d", "8"]
_DASHES = [_SOLID, _DASHED, _DOTTED, _DASHDOT]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label; no two share colour, marker and dash, and the order of labels does not matter.

    A label that begins with a known name gets the colour of this name, and its marker and dash if they are free.
    """
    names = sorted(set(labels))
    found = {name: KNOWN[name] for name in names if name in KNOWN}
    taken = set(found.values())
    for name in names:
        if name not in found:
            style = next((style for style in _candidates(name) if style not in taken), _first(name))
            found[name] = style
            taken.add(style)
    return found


def _first(name: str) -> Style:
    return next(iter(_candidates(name)))


def _candidates(name: str) -> Iterable[Style]:
    """Styles for a name that has none of its own, the likeliest first."""
    kin = max((known for known in KNOWN if name.startswith(known)), key=len, default=None)
    if kin:
        own = KNOWN[kin]
        dashes = [own.dash, *(dash for dash in _DASHES if dash != own.dash)]
        markers = [own.marker, *(marker for marker in _MARKERS if marker != own.marker)]
        for marker, dash in product(markers, dashes):
            yield Style(own.color, marker, dash)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    count = len(_COLORS) * len(_MARKERS) * len(_DASHES)
    for step in range(count):
        at = (seed + step) % count
        color, rest = at % len(_COLORS), at // len(_COLORS)
        yield Style(_COLORS[color], _MARKERS[rest % len(_MARKERS)], _DASHES[rest // len(_MARKERS)])
