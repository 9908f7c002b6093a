"""Classification of images: the model learns to choose one of several classes for each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .by_image import ByImage, read_image_processor


@dataclass(frozen=True)
class ImageClassification(ByImage):
    """Predicting the class of an image with the model's head, which is trained in full."""

    pipeline: ClassVar[str] = "image-classification"
    kind: ClassVar[str] = "classifier of images"
    processor: ClassVar[str] = "image processor"

    def read_processor(self, folder: Path) -> Any:
        return read_image_processor(folder)

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification
