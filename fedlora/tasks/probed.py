"""An encoder of texts with one more linear layer, `probe`, on its mean hidden state."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

LAYER = "probe"
_SEED = 1


@lru_cache(maxsize=8)
def original(outputs: int, inputs: int) -> Tensor:
    """The frozen weight of `probe`, fp32 [outputs, inputs]: random rows of norm 1, the same in every process."""
    generator = torch.Generator().manual_seed(_SEED)
    return nn.functional.normalize(torch.randn(outputs, inputs, generator=generator), dim=1)


class Probed(PreTrainedModel):
    """`y = probe(x)`, where x [d] is the mean of the encoder's last hidden states over a text, of norm sqrt(d).

    The encoder is frozen and has no adapter. Therefore it reads each text once in a process, and x is kept.

    Args:
        config: the encoder's config; its `num_labels` is the number of outputs of `probe`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_missing = [r"probe\.weight"]  # noqa: RUF012 - as in transformers

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.probe = nn.Linear(config.hidden_size, config.num_labels or 1, bias=False)
        self._known: dict[bytes, Tensor] = {}
        self.post_init()

    @classmethod
    def from_config(cls, config: PreTrainedConfig, dtype: torch.dtype, **_: Any) -> Probed:
        """A model of these shapes, as the auto classes of transformers make it."""
        return cls._from_config(_without_dropout(config), dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Any, num_labels: int, **options: Any) -> Any:
        """The encoder's weights in a folder, and `original` as `probe`; arguments as in transformers."""
        config = _without_dropout(AutoConfig.from_pretrained(folder, num_labels=num_labels))
        return super().from_pretrained(folder, config=config, **options)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.probe:
            with torch.no_grad():
                self.probe.weight.copy_(original(*self.probe.weight.shape))

    def get_output_embeddings(self) -> nn.Module:
        return self.probe

    def train(self, mode: bool = True) -> Probed:
        """As in torch, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """The outputs [rows, outputs] as `logits`, and x [rows, d] as `hidden_states`."""
        x = self._features(input_ids, attention_mask)
        return SequenceClassifierOutput(logits=self.probe(x), hidden_states=(x,))  # pyright: ignore[reportArgumentType]

    def _features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens, lengths = input_ids.cpu().numpy(), attention_mask.sum(dim=1).tolist()
        keys = [row[:length].tobytes() for row, length in zip(tokens, lengths, strict=True)]
        for at, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if key not in self._known:  # read alone, so that its digits do not depend on the texts beside it
                self._known[key] = self._read(input_ids[at, :length])
        return torch.stack([self._known[key] for key in keys])

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> Tensor:
        mean = self.encoder(input_ids=tokens[None]).last_hidden_state[0].mean(dim=0)
        return nn.functional.normalize(mean, dim=0) * len(mean) ** 0.5


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with all rates of dropout at 0, since the encoder is never trained."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
