"""The largest number of tokens for which a model has positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fedlora.common.errors import ConfigError
from fedlora.config import Config

_TABLES = ("position_embeddings", "embed_positions", "wpe")


def longest(model: nn.Module) -> int | None:
    """The largest number of tokens that a model takes; None if positions are computed, without a limit.

    Args:
        model: the model, which may be on the meta device.
    """
    return min(_limits(model), default=None)


def check_length(most: int | None, config: Config) -> None:
    """Raise ConfigError if `data.max-length` is larger than `most`, the result of `longest`."""
    length = config.data.max_length
    if most is not None and length > most:
        raise ConfigError(
            f"data.max-length = {length}, but {config.model.name} has positions for at most {most} tokens; set it to "
            f"{most} or less"
        )


def _limits(model: nn.Module) -> Iterator[int]:
    settings: Any = getattr(model, "config", None)
    if getattr(settings, "model_type", "") == "mpt":  # its position biases have this length
        yield int(settings.max_seq_len)
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and leaf in _TABLES:
            # OPT and BART do not use the first rows; RoBERTa does not use those up to the pad token's.
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - unused
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] == "embed_positions" and buffer.ndim == 2:  # GPT-J's sines
            yield len(buffer)
