"""Which layer of the model a module belongs to, by its name."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\.(\d+)\.")


def layer_of(module: str) -> int | None:
    """The first number among the parts of a module's name, as 3 in layers.3.self_attn.q_proj; None without a number."""
    found = _NUMBER.search(f".{module}.")
    return int(found[1]) if found else None
