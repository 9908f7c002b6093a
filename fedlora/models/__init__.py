"""Base models, which are found by name, identified by content, quantized once and loaded once in each process."""

from fedlora.models.base.devices import pick_device, pick_dtype
from fedlora.models.base.fingerprint import fingerprint
from fedlora.models.base.folders import at_hand, resolve
from fedlora.models.base.head import fresh as fresh_head
from fedlora.models.base.limits import check_length, longest
from fedlora.models.base.load import (
    BaseModel,
    base_fingerprint,
    first_head,
    head_modules,
    head_shapes,
    load_base,
    meta_model,
    pad_id,
    shared_tokenizer,
    tokenizer_of,
)
from fedlora.models.base.targets import find_targets, summary
from fedlora.models.base.tied import tied_with, untie

__all__ = [
    "BaseModel",
    "at_hand",
    "base_fingerprint",
    "check_length",
    "find_targets",
    "fingerprint",
    "first_head",
    "fresh_head",
    "head_modules",
    "head_shapes",
    "load_base",
    "longest",
    "meta_model",
    "pad_id",
    "pick_device",
    "pick_dtype",
    "resolve",
    "shared_tokenizer",
    "summary",
    "tied_with",
    "tokenizer_of",
    "untie",
]
