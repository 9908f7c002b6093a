"""How many tokens a model has positions for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fedlora.common.errors import ConfigError
from fedlora.config import Config

_TABLES = ("position_embeddings", "embed_positions", "wpe")


def longest(model: nn.Module) -> int | None:
    """The most tokens that a model takes; None where positions are computed, and do not end.

    Args:
        model: it may be on the meta device.
    """
    return min(_limits(model), default=None)


def check_length(most: int | None, config: Config) -> None:
    """Raises ConfigError when `data.max-length` is beyond the model's positions, as `longest` counts them."""
    length = config.data.max_length
    if most is not None and length > most:
        raise ConfigError(
            f"data.max-length = {length}: {config.model.name} has positions for {most} tokens, and no more; set it to "
            f"{most} or less"
        )


def _limits(model: nn.Module) -> Iterator[int]:
    settings: Any = getattr(model, "config", None)
    if getattr(settings, "model_type", "") == "mpt":  # its biases by distance end there
        yield int(settings.max_seq_len)
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and leaf in _TABLES:
            # OPT and BART leave the first rows unused, RoBERTa those up to the pad token's.
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - unused
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] == "embed_positions" and buffer.ndim == 2:  # GPT-J's sines
            yield len(buffer)
