"""The node's limit on memory, which the operating system or CUDA's allocator enforces, whatever a run asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from fedlora.config import Scalar

from . import rules

KEY = "max-memory-mb"
# Texts of allocators' errors; torch has no exception of its own for memory of the CPU.
_SAYINGS = ("can't allocate memory", "out of memory", "cannot allocate memory")
_log = logging.getLogger("fedlora")


def limit(settings: Mapping[str, Scalar], device: torch.device) -> None:
    """Limit this process to the node's `max-memory-mb`, if its config has this key.

    On CUDA, the limit is for what torch allocates on that device. Elsewhere it is for the process's writable memory
    (Linux's RLIMIT_DATA: all memory that was allocated, used or not, but without mapped model files).

    Args:
        settings: the node's config.
        device: the device on which the run computes.
    """
    megabytes = rules.limit(settings, KEY)
    if not megabytes:
        return
    most = megabytes * 2**20
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), index)
        return
    try:
        import resource
    except ImportError:  # Windows
        _log.warning("node config: %s cannot be enforced on this system", KEY)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(saying in str(error).lower() for saying in _SAYINGS)


def refusal(settings: Mapping[str, Scalar]) -> str:
    """The message to the server when memory ran out."""
    allowed = settings.get(KEY)
    fix = "lower train.batch-size, data.max-length or the rank, or set model.gradient-checkpointing = true"
    if allowed is None:
        return f"this node's memory does not suffice for the run; {fix}"
    return f"the run needs more memory than this node allows (node config: {KEY} = {allowed}); {fix}"
