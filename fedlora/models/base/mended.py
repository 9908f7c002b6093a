"""Mends what bitsandbytes gets wrong, for the whole process."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor

from fedlora.common.errors import ModelError

_NAME = "bitsandbytes::dequantize_4bit"
# The kernel that calls on a CPU go to. It has to live as long as the process.
_LIBRARY = torch.library.Library("bitsandbytes", "IMPL")


@cache
def mend() -> None:
    """Make 4-bit weights of every width be read rightly on the CPU; nothing is changed where they are already.

    On CPUs with AVX512, bitsandbytes 0.50 takes an entry's scale from the wrong block of 64 where the number of a
    layer's inputs is no multiple of 64. A weight is then two to four times as far off as it should be. A matrix of one
    row is read rightly, and has the same blocks.

    Raises:
        ModelError: weights are read wrongly here, and this torch cannot replace the kernel.
    """
    if not _wrong():
        return
    if not hasattr(torch.library, "get_kernel"):
        raise ModelError(
            "model.quantization = nf4: bitsandbytes reads 4-bit weights wrongly on this CPU, and torch "
            f"{torch.__version__} cannot replace its kernel; install torch 2.13 or newer, or set model.quantization = "
            "none or int8"
        )
    kernel, keys = torch.library.get_kernel(_NAME, "CPU"), torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def by_blocks(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, *rest: Any) -> Tensor:
        shape, dtype = rest
        flat = [1, torch.Size(shape).numel()] if shape[-1] % blocksize else shape
        return kernel.call_boxed(keys, A, absmax, blocksize, quant_type, flat, dtype).reshape(shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that a kernel is replaced
        _LIBRARY.impl("dequantize_4bit", by_blocks, "CPU", allow_override=True)


@cache
def mend_int8() -> None:
    """Make int8 layers take inputs of more than three axes, such as ConvNeXt's [rows, height, width, channels].

    bitsandbytes 0.50 makes rows of all axes but the last where there are three of them, and fails where there are more.
    """
    plain = Linear8bitLt.forward

    def of_rows(self: Linear8bitLt, x: Tensor) -> Tensor:
        if x.ndim <= 3:
            return plain(self, x)
        return plain(self, x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    Linear8bitLt.forward = of_rows


def _wrong() -> bool:
    """Whether rows of half a block get other values than the same numbers in one row."""
    rows = torch.tensor([[1.0], [8.0], [64.0], [512.0]]).expand(4, 32)
    found = [
        dequantize_4bit(*quantize_4bit(part.contiguous(), quant_type="nf4")) for part in (rows, rows.reshape(1, 128))
    ]
    return not torch.equal(found[0].flatten(), found[1].flatten())
