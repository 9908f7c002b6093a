"""The base class of tasks in which the model chooses one of several classes for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.common.errors import ConfigError
from fedlora.config import Config, DataConfig
from fedlora.data import Example, collate, form_of
from fedlora.data.forms import each
from fedlora.data.images import decoded, looked_at

from .augmented import augmented, names_of
from .base import Batch
from .by_class import ByClass
from .pixels import frame_of, resized

if TYPE_CHECKING:
    from datasets import Dataset

# Keys that say how texts are read.
_OF_TEXTS = (
    "text_column",
    "prompt_column",
    "response_column",
    "messages_column",
    "chat_template",
    "system_prompt",
    "max_length",
)
_AT_ONCE = 256  # rows of images that are in memory at a time, as they are stored


@dataclass(frozen=True)
class ByImage(ByClass):
    """Predicting the class of an image.

    An example has the `pixels` of an image, uint8 [3, height, width] as the model's image processor resizes and crops
    it, and the processor's `scale` and `shift` [3]. The model's input is `pixels * scale + shift`, computed on its
    device. The number of tokens of an image is the number of its pixels.

    Args:
        labels: number of classes; set by `model.labels`.
    """

    forms: ClassVar[tuple[str, ...]] = ("image",)
    peft_type: ClassVar[str | None] = None
    unit: ClassVar[str] = "pixels"
    keeps_examples: ClassVar[bool] = False

    def check_config(self, config: Config) -> None:
        super().check_config(config)
        names_of(config.train.augment)
        default = DataConfig()
        for name in _OF_TEXTS:
            if (value := getattr(config.data, name)) != getattr(default, name):
                raise ConfigError(
                    f"data.{name.replace('_', '-')} = {value!r} is about texts, but model.task = "
                    f"{config.model.task!r} reads images; remove it (data.image-column names the column of the images)"
                )

    def unusable(self, rows: Dataset, tokenizer: Any, data: DataConfig) -> tuple[dict[int, str], dict[int, str]]:
        """See `Task`. Only the heads of the images are read; a fault in the rest is found when a row is encoded."""
        form_of(rows.column_names, data, self)
        seen = rows.select_columns([data.image_column, data.label_column])

        def look(row: Mapping[str, Any]) -> str:
            return looked_at(row[data.image_column]) or ("a blank label" if row[data.label_column] is None else "")

        idle: dict[int, str] = {}
        faults: dict[int, str] = {}
        for start in range(0, len(rows), _AT_ONCE):
            found, wrong = each(seen.select(range(start, min(start + _AT_ONCE, len(rows)))), look)
            idle |= {start + at: why for at, why in enumerate(found) if why}
            faults |= {start + at: why for at, why in wrong.items()}
        return idle, faults

    def encode(
        self, rows: Dataset, tokenizer: Any, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]:
        form_of(rows.column_names, data, self)
        processor, shared = self.image_processor(tokenizer), self.shared(rows, tokenizer, data)

        def read(row: Mapping[str, Any]) -> Example:
            pixels = resized(decoded(row[data.image_column]), processor)
            return Example({"pixels": pixels, **shared, "labels": int(row[data.label_column])}, pixels[0].size)

        return each(rows.select_columns([data.image_column, data.label_column]), read)

    def image_processor(self, processor: Any) -> Any:
        """The image processor in what `read_processor` returns."""
        return processor

    def shared(self, rows: Dataset, processor: Any, data: DataConfig) -> dict[str, Any]:
        """The arrays that all examples have in common, by name: the image processor's `scale` and `shift`."""
        frame = frame_of(self.image_processor(processor))
        return {"scale": frame.scale, "shift": frame.shift}

    def learned(self, example: Example) -> Sequence[bool]:
        return []

    def picture(self, example: Example) -> np.ndarray:
        return example["pixels"].transpose(1, 2, 0)

    def first_inputs(self, tokenizer: Any, vocabulary: int) -> Batch:
        """Two images of random pixels."""
        frame = frame_of(self.image_processor(tokenizer))
        drawn = torch.randint(256, (2, *frame.shape), generator=torch.Generator().manual_seed(0))
        return {"pixel_values": _scaled(drawn, torch.tensor(frame.scale)[None], torch.tensor(frame.shift)[None])}

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        return collate(examples, {})

    def augmented(self, examples: Sequence[Example], names: str, seed: int) -> Sequence[Example]:
        if not names or not examples:
            return examples
        changed = augmented(np.stack([example["pixels"] for example in examples]), names, seed)
        return [
            replace(example, arrays={**example.arrays, "pixels": pixels})
            for example, pixels in zip(examples, changed, strict=True)
        ]

    def tokens(self, batch: Batch) -> Tensor:
        pixels = batch["pixels"]
        return torch.full((len(pixels),), pixels[0, 0].numel())

    def inputs(self, model: nn.Module, batch: Batch) -> Batch:
        like = next(model.parameters())  # of the embedding of patches, in the compute dtype
        values = _scaled(*(batch[name].to(like.device) for name in ("pixels", "scale", "shift")))
        return {"pixel_values": values.to(like.dtype)}


def read_image_processor(folder: Path) -> Any:
    """The image processor in a model's folder, with pillow's arithmetic, which is the same on every machine."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def _scaled(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The model's input [rows, 3, height, width] in fp32 from pixels, and scale and shift [rows, 3]."""
    return torch.addcmul(shift[:, :, None, None], pixels.float(), scale[:, :, None, None])
