"""Dropout in which each client has its own random numbers, however many clients share a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def draws_per_client(model: nn.Module) -> bool:
    """Whether dropout can be drawn for each client in this model. The model must have dropout, but no checkpointing.

    Gradient checkpointing runs a forward pass twice and restores only torch's own generator, so that dropout must stay
    torch's there.
    """
    if getattr(model, "is_gradient_checkpointing", False):
        return False
    config = getattr(model, "config", None)
    settings = {} if config is None else vars(config)
    rates = [value for name, value in settings.items() if "drop" in name and isinstance(value, float)]
    return any(rates) or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


# Number of a tensor's dimensions -> those that have the batch's length: [rows, features], [rows, length, features],
# [rows, heads, length, length].
_LENGTH_DIMS = {2: (), 3: (1,), 4: (2, 3)}


@dataclass
class Draws(TorchFunctionMode):
    """A context in which all dropout draws for each client from that client's own generator.

    A client's mask is drawn in the shape that its part of the batch would have alone, without padding for longer
    examples of other clients. It therefore does not depend on the other clients in the batch.

    Attributes:
        generators: the generator of each client. A batch's rows belong to the first `len(lengths)` clients, in equal
            parts.
        lengths: the length of each client's longest example in the present batch.
    """

    generators: Sequence[torch.Generator]
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return input * self._mask(input, p) if training and p > 0 else input

    def _attention(  # noqa: PLR0917 - torch's own arguments
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`softmax(Q K' scale + mask)` with dropout, times V, as the fused kernel computes it."""
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(dim=-1)
        return weights * self._mask(weights, dropout_p) @ value

    def _mask(self, like: Tensor, p: float) -> Tensor:
        """A mask of 0 and 1/(1 - p), drawn for each client from its generator, with 0 outside a client's own part."""
        mask = like.new_zeros(like.shape)
        parts = mask.chunk(len(self.lengths))
        for part, length, generator in zip(parts, self.lengths, self.generators, strict=False):
            own = part
            for dim in _LENGTH_DIMS[like.ndim]:
                own = own.narrow(dim, 0, min(length, own.shape[dim]))
            own.copy_(
                torch.empty(own.shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p, generator=generator)
            )
        return mask.div_(1 - p)
