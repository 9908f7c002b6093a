"""Classification of images by texts: the class of an image is the one whose prompt the model finds most like it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.common.errors import DataError, ModelError
from fedlora.config import DataConfig

from . import groups
from .base import Batch
from .by_image import ByImage
from .image_text_processor import ImageTextProcessor, read

if TYPE_CHECKING:
    from datasets import Dataset

_OF_IMAGES = ("vision_model", "visual_projection")  # the parts of a model that see images alone
_PROMPTS = ("a photo", "a photo of a cat")  # with which a model is tried
_CLOSE = 0.02  # largest difference from the model's own logits, as a share of their size; rounding in bf16 is less


@dataclass(frozen=True)
class ImageText(ByImage):
    """Predicting the class of an image with a model of two towers, such as CLIP or SigLIP, and a prompt for each class.

    The logits are the model's own, `exp(logit_scale) cos(image, prompt) + logit_bias`, with a bias in SigLIP alone. The
    loss is the cross-entropy over the run's classes, as in CLIP-LoRA (Zanella and Ben Ayed 2024,
    https://arxiv.org/abs/2405.18541). SigLIP was itself trained with a sigmoid for each pair of an image and a text; in
    the softmax over classes its bias has no effect. There is no head, and nothing but adapters is trained.

    Beside an image's arrays, an example has the `prompts` of all classes and their `mask`, int64 [classes, length],
    which are the same in all examples. A prompt goes through the text tower once for all rows that have one adapter.

    Args:
        labels: number of classes; set by `model.labels`.
        template: the prompt of a class; its name takes the place of {}.
    """

    pipeline: ClassVar[str] = "zero-shot-image-classification"
    kind: ClassVar[str] = "model of images and texts"
    processor: ClassVar[str] = "image processor and tokenizer"

    template: str = "a photo of a {}"

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template = {self.template!r}: expected a text with one {{}}, which is a class's name")

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:
        super().check_rows(rows, data)
        names = self.class_names(rows, data)
        if len(names) != self.labels:
            raise DataError(
                f"{data.source}: model.task = 'image-text' needs a name for each of the {self.labels} classes, but "
                f"column {data.label_column!r} has {len(names) or 'no'} names; set data.label-names to the names in "
                "the order of the classes"
            )

    def model_options(self) -> dict[str, Any]:
        return {}

    def unquantized(self) -> tuple[str, ...]:
        """The last layers of both towers, whose outputs are compared."""
        return ("visual_projection", "text_projection", "vision_model.head", "text_model.head")

    def read_processor(self, folder: Path) -> ImageTextProcessor:
        return read(folder)

    def image_processor(self, processor: ImageTextProcessor) -> Any:
        return processor.images

    def shared(self, rows: Dataset, processor: ImageTextProcessor, data: DataConfig) -> dict[str, Any]:
        """Also the `prompts` of the classes, and their `mask`."""
        texts = [self.template.replace("{}", name) for name in self.class_names(rows, data)]
        return super().shared(rows, processor, data) | processor.prompts(texts)

    def auto_class(self) -> Any:
        from transformers import AutoModelForZeroShotImageClassification

        return AutoModelForZeroShotImageClassification

    def first_inputs(self, tokenizer: ImageTextProcessor, vocabulary: int) -> Batch:
        """Two images of random pixels, and two prompts."""
        found = {name: torch.from_numpy(values) for name, values in tokenizer.prompts(_PROMPTS).items()}
        pixels = super().first_inputs(tokenizer, vocabulary)
        return {**pixels, "input_ids": found["prompts"], "attention_mask": found["mask"]}

    def first_logits(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The model's own logits.

        Raises:
            ModelError: they are not what this task makes of the features of images and of texts.
        """
        own = model(**inputs).logits_per_image.float()
        try:
            images = _images(model, inputs["pixel_values"])
            logits = _scaled(model, images @ _texts(model, inputs["input_ids"], inputs["attention_mask"]).T)
            same = float((logits - own).abs().max()) <= _CLOSE * max(1.0, float(own.abs().max()))
        except (AttributeError, TypeError, RuntimeError):
            same = False
        if not same:
            raise ModelError(
                f"model.name: a {type(model).__name__} does not compare the features of an image and of a text as "
                "model.task = 'image-text' does; choose a CLIP or a SigLIP"
            )
        return own

    def logits(
        self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        pixels = self.inputs(model, batch)["pixel_values"]
        targets, numbers = batch["labels"].to(pixels.device), torch.arange(len(pixels), device=pixels.device)
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if adapters is None:
            images = _images(inner, pixels)
            texts = self._of_groups(inner, batch)
            found = (images.unflatten(0, (len(texts), -1)) @ texts.mT).flatten(0, 1)
        else:
            names = [*dict.fromkeys(adapters)]
            with _mixed(model, adapters):
                images = _images(inner, pixels)
            with _mixed(model, [name for name in names for _ in range(self.labels)]):
                texts = _of_batch(inner, batch, [0] * len(names))
            found = torch.einsum("rd,rcd->rc", images, texts[[names.index(name) for name in adapters]])
        return _scaled(inner, found), targets, numbers

    def _of_groups(self, model: Any, batch: Batch) -> Tensor:
        """The features of all prompts [groups, classes, d], once for each group of rows that has an adapter of its own.

        Without an adapter in the text tower, they are constants: all rows are then one group, and nothing is dropped.
        """
        present = groups.present()
        if not _adapts_texts(model):
            with _evaluating(model.text_model):
                return _of_batch(model, batch, [0])
        if present is None:
            return _of_batch(model, batch, [0])
        rows, count, length = (len(batch["labels"]), *batch["prompts"].shape[1:])
        present.share(present.count * count, length)
        return _of_batch(model, batch, range(0, rows, rows // present.count))


def _of_batch(model: nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
    """The features of the prompts of some rows of a batch, fp32 [rows, classes, d]."""
    device = next(model.parameters()).device
    ids, mask = (batch[name][[*rows]].to(device) for name in ("prompts", "mask"))
    return _texts(model, ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (len(ids), -1))


def _images(model: Any, pixels: Tensor) -> Tensor:
    """The features of images [rows, 3, height, width], of norm 1, fp32 [rows, d]."""
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


def _texts(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The features of texts [texts, length], of norm 1, fp32 [texts, d]."""
    return F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float(), dim=-1)


def _scaled(model: Any, cosines: Tensor) -> Tensor:
    """The model's logits from cosines of any shape, in fp32, since a scale of 100 would show the rounding of bf16."""
    bias = getattr(model, "logit_bias", None)
    logits = cosines * model.logit_scale.float().exp()
    return logits if bias is None else logits + bias.float()


def _adapts_texts(model: nn.Module) -> bool:
    """Whether a layer that sees texts has an adapter."""
    return any(isinstance(part, LoraLayer) and not name.startswith(_OF_IMAGES) for name, part in model.named_modules())


@contextmanager
def _evaluating(tower: nn.Module) -> Iterator[None]:
    """Within the block, the tower is in eval mode."""
    before = tower.training
    tower.eval()
    try:
        yield
    finally:
        tower.train(before)


def _mixed(model: nn.Module, adapters: Sequence[str]) -> AbstractContextManager[Any]:
    """Within the block, each row has the adapter of this name, as in a call of the PEFT model with `adapter_names`."""
    return (
        model._enable_peft_forward_hooks(adapter_names=[*adapters]) if isinstance(model, PeftModel) else nullcontext()
    )
