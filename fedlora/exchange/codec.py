"""Number formats of clients' uploads: fp32, bf16, fp16, int8 or int4 with one scale per row, and sparse.

In coarse formats, a client sends the difference between the trained factors and those that it was sent, which the
server knows too. The change of one round is small beside the factors, and would be lost in their rounding. What a
format leaves out of one reply is added to the next one (error feedback, Seide et al. 2014; Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847, Algorithm 2), if the strategy is steady.

In the format sparse, a tensor is its entries other than zero in fp32, and for each a byte or more that says how many
zeros stand before it. It loses nothing; what a client leaves out is chosen before (`largest`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.adapters.state import map_tensors

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = {"int8": 127, "int4": 7}  # symmetric: -8 and -128 are not used
SPARSE = "sparse"
FORMATS = (*FLOATS, *LARGEST, SPARSE)
_LONG = 255  # a byte of `gaps` that stands for as many zeros, and no entry after them


def code(rows: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Integer codes and one scale per row: rows = codes * scale, rounded to nearest.

    Args:
        rows: finite values, [n, width].
        largest: the largest code, which stands for the largest magnitude of each row.

    Returns:
        int8 codes [n, width] and fp32 scales [n].
    """
    scales = rows.abs().amax(dim=1).float() / largest
    safe = scales.where(scales > 0, torch.ones_like(scales))
    return (rows / safe[:, None]).round().clamp(-largest, largest).to(torch.int8), scales


def pack(codes: Tensor) -> Tensor:
    """Codes from -8 to 7, [n, width], with two of them in each byte: uint8 [n, ceil(width / 2)]."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.int16) + 8
    return (even[:, ::2] + 16 * even[:, 1::2]).to(torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The codes that `pack` was given, [n, width]."""
    wide = packed.to(torch.int16)
    codes = torch.stack([wide % 16, wide // 16], dim=2).flatten(1) - 8
    return codes[:, :width].to(torch.int8)


def rows_of(tensor: Tensor, name: str) -> Tensor:
    """The tensor as rows that have a scale each: rows of A, columns of B, slices of a tensor, or a whole vector.

    Args:
        tensor: a factor, or a tensor trained in full, whose slices are those along its first dimension.
        name: "A", "B", or any other name.
    """
    if name == "B":
        return tensor.T
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def from_rows(rows: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor that `rows_of` made rows of."""
    return rows.T.contiguous() if name == "B" else rows.reshape(shape)


def round_trip(state: AdapterState, number_format: str) -> AdapterState:
    """The adapter as the other side reads it after it was sent in this number format."""
    if number_format == SPARSE:
        return state
    if number_format in FLOATS:
        return map_tensors(lambda name, x: x.to(FLOATS[number_format]).to(x.dtype), state)
    largest = LARGEST[number_format]

    def there_and_back(name: str, tensor: Tensor) -> Tensor:
        codes, scales = code(rows_of(tensor, name), largest)
        return from_rows(codes * scales[:, None], tuple(tensor.shape), name)

    return map_tensors(there_and_back, state)


def largest(state: AdapterState, share: float) -> AdapterState:
    """The adapter with its largest entries alone; all others are zero.

    Args:
        state: factors and tensors, all of which compete with each other.
        share: of the entries that are kept, rounded up, above 0 and at most 1.
    """
    found = [tensor for tensor in OWN.put(state).values() if tensor.numel()]
    total = sum(tensor.numel() for tensor in found)
    count = math.ceil(share * total)
    if count >= total:
        return state
    sizes = torch.cat([tensor.detach().abs().flatten() for tensor in found])
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(count, sorted=False).indices] = True
    masks = iter(kept.split([tensor.numel() for tensor in found]))
    chosen = {id(tensor): next(masks).reshape(tensor.shape) for tensor in found}
    return map_tensors(lambda name, x: x * chosen[id(x)] if x.numel() else x, state)


def gaps(entries: np.ndarray[Any, Any], total: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The zeros before each entry and after the last one, in bytes: 255 is as many zeros and no entry.

    Args:
        entries: ascending positions, below `total`.
        total: number of positions.
    """
    zeros = np.diff(entries, prepend=-1) - 1
    after = total - 1 - (int(entries[-1]) if len(entries) else -1)
    long = zeros // _LONG
    found = np.full(len(entries) + int(long.sum()) + after // _LONG, _LONG, np.uint8)
    found[np.cumsum(long + 1) - 1] = zeros % _LONG
    return found


def entries(gaps: np.ndarray[Any, np.dtype[np.uint8]], total: int) -> np.ndarray[Any, Any] | None:
    """The positions that `gaps` was given; None if these gaps are not of so many positions."""
    ends = np.cumsum(np.where(gaps == _LONG, _LONG, gaps.astype(np.int64) + 1))
    rest = total - (int(ends[-1]) if len(ends) else 0)
    return ends[gaps != _LONG] - 1 if 0 <= rest < _LONG else None
