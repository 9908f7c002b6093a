"""Classification of images: the model learns to choose one of several classes for each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.common.errors import ModelError

from .by_image import ByImage, read_image_processor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ImageClassification(ByImage):
    """Predicting the class of an image with the model's head, which is trained in full."""

    pipeline: ClassVar[str] = "image-classification"
    kind: ClassVar[str] = "classifier of images"
    processor: ClassVar[str] = "image processor"

    def read_processor(self, folder: Path) -> Any:
        return read_image_processor(folder)

    def check_architecture(self, name: str, settings: PreTrainedConfig) -> None:
        if hasattr(settings, "vision_config") and hasattr(settings, "text_config"):
            raise ModelError(
                f"{name}: a {settings.model_type} model compares images with texts and has no classifier's head; set "
                "model.task = 'image-text', or choose another model"
            )

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification
