"""Random signs that are the same on every machine, for tensors that are never sent."""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def signs(name: str, seed: int, *shape: int) -> Tensor:
    """A tensor of +1 and -1 by the bits of SHA-256 in counter mode. It is shared, and must not be changed.

    torch promises the same random numbers neither from version to version nor from device to device.

    Args:
        name: what the tensor is for; another name gives other signs.
        seed: another seed gives other signs, too.
        shape: of the tensor.
    """
    count = math.prod(shape)
    blocks = [hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest() for block in range(math.ceil(count / 256))]
    octets = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (bits.flatten()[:count].float() * 2 - 1).reshape(shape)
