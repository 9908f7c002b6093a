"""Base models: found by name, told apart by content, quantized once, loaded once per process."""

from .devices import pick_device, pick_dtype
from .fingerprint import fingerprint
from .folders import resolve
from .head import fresh as fresh_head
from .limits import check_length
from .load import BaseModel, base_fingerprint, first_head, head_modules, head_shapes, load_base, meta_model
from .targets import find_targets
from .tied import tied_with, untie

__all__ = [
    "BaseModel",
    "base_fingerprint",
    "check_length",
    "find_targets",
    "fingerprint",
    "first_head",
    "fresh_head",
    "head_modules",
    "head_shapes",
    "load_base",
    "meta_model",
    "pick_device",
    "pick_dtype",
    "resolve",
    "tied_with",
    "untie",
]
