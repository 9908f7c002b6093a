"""Number formats of clients' uploads: fp32, bf16, fp16, and int8 or int4 with one scale per row.

In coarse formats, a client sends the difference between the trained factors and those that it was sent, which the
server knows too. The change of one round is small beside the factors, and would be lost in their rounding. What a
format leaves out of one reply is added to the next one (error feedback, Seide et al. 2014; Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847, Algorithm 2), if the strategy is steady.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.state import map_tensors

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = {"int8": 127, "int4": 7}  # symmetric: -8 and -128 are not used
FORMATS = (*FLOATS, *LARGEST)


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
    if number_format in FLOATS:
        return map_tensors(lambda name, x: x.to(FLOATS[number_format]).to(x.dtype), state)
    largest = LARGEST[number_format]

    def there_and_back(name: str, tensor: Tensor) -> Tensor:
        codes, scales = code(rows_of(tensor, name), largest)
        return from_rows(codes * scales[:, None], tuple(tensor.shape), name)

    return map_tensors(there_and_back, state)
