"""A device that is pretended: FEDLORA_TEST_DEVICE=pretended:0 finds what would mix devices on a GPU, without a GPU.

Its memory and its arithmetic are the processor's, so that the tests' numbers are those of the CPU; an operation that
takes tensors of both is refused as on a GPU. Needs a C++ compiler, which makes it once from `device.cpp`, in about a
minute. Processes that tests start do not know it: `tests.device.starts_processes` marks such tests.
It has no convolutions, so that the zoo's models that have them, such as Mamba, fail on it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

NAME = "pretended"
SOURCE = Path(__file__).with_name("device.cpp")
COMPILER = os.environ.get("CXX", "c++")
BUILD = Path(__file__).resolve().parents[2] / "build"


def register() -> None:
    """Make the device known to this process's torch."""
    library = _built()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.ops.load_library(library)
    _let_int8_move()


def _built() -> Path:
    """The compiled library, for this source and this torch."""
    content = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = BUILD / f"{NAME}-{content}.so"
    BUILD.mkdir(exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not library.exists():
            from torch.utils import cpp_extension

            made = library.with_suffix(".part")
            command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(made)]
            command += [f"-I{path}" for path in cpp_extension.include_paths()]
            command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
            command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
            subprocess.run(command, check=True)
            made.rename(library)
    return library


def _let_int8_move() -> None:
    """bitsandbytes gives an int8 weight of the CPU the memory of another device, which torch lets known devices do."""
    from bitsandbytes.nn import Int8Params

    in_place = Int8Params._quantize

    def quantized(self: Int8Params, device: Any) -> Any:
        if torch.device(device).type != NAME or self.has_fp16_weights:
            return in_place(self, device)
        own = in_place(Int8Params(self.data.clone(), requires_grad=False), torch.device("cpu"))
        codes, scales = (part.to(device) for part in (own.CB, own.SCB))
        return Int8Params(codes, requires_grad=self.requires_grad, CB=codes, SCB=scales)

    Int8Params._quantize = quantized  # pyright: ignore[reportAttributeAccessIssue]


class _Device:
    """As `torch.cuda.device`: there is one alone."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _module() -> ModuleType:
    """What torch asks of a device's module, as `torch.cuda`."""
    module = ModuleType(f"torch.{NAME}")
    facts: dict[str, Any] = {
        "device": _Device,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "synchronize": lambda index=None: None,
        "empty_cache": lambda: None,
        # What draws without a generator of its own draws from the processor's.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda index=None: torch.get_rng_state(),
        "set_rng_state": lambda state, index=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, value in facts.items():
        setattr(module, name, value)
    sys.modules[module.__name__] = module
    return module
