"""Devices and number formats by name."""

from __future__ import annotations

import torch

from fedlora.common.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, key: str = "model.device") -> torch.device:
    """The device of this name; auto is the first of cuda, mps and cpu that this machine has.

    Args:
        name: a name such as auto, cpu or cuda:1.
        key: the configuration key with the name, for error messages.

    Raises:
        ModelError: this machine has no such device.
    """
    if name == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(backend for backend, there in backends.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"{key} = {name!r} is not a device, expected auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"{key} = {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu, or install torch for CUDA and check the driver"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"{key} = {name!r}, but there is no such device here; use auto or cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; auto is bf16 on a GPU that supports it natively, and otherwise fp32.

    A CPU without bf16 instructions would emulate them, about 20 times slower than fp32.
    """
    if name != "auto":
        return DTYPES[name]
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
