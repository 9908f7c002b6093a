"""Which layer of a model a module belongs to, by its name."""

from __future__ import annotations

import re

_LAYER = re.compile(r"^(?:.*?\.)?(\d+)(?=\.)")


def layer_of(module: str) -> int | None:
    """The first number among the parts of a module's name, as 3 in layers.3.self_attn.q_proj; None without a number."""
    found = _LAYER.match(f"{module}.")
    return int(found[1]) if found else None


def block_of(module: str) -> str | None:
    """The layer's own name, as model.layers.3 of model.layers.3.self_attn.q_proj; None without a number."""
    found = _LAYER.match(f"{module}.")
    return found[0] if found else None
