"""Base models: found by name, told apart by content, quantized once, loaded once per process."""

from .devices import pick_device, pick_dtype
from .fingerprint import fingerprint
from .folders import resolve
from .load import BaseModel, base_fingerprint, head_modules, load_base, meta_model, tokenizer_of

__all__ = [
    "BaseModel",
    "base_fingerprint",
    "fingerprint",
    "head_modules",
    "load_base",
    "meta_model",
    "pick_device",
    "pick_dtype",
    "resolve",
    "tokenizer_of",
]
