"""Training of small image models on Fashion-MNIST, as classifiers whose last layer is thrown away."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedlora.common.assets import Say
from fedlora.data.image_files import read_idx

_SAY_SECONDS = 3.0  # time between two lines about the progress


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The same recipe gives the same model on one machine with one number of threads.

    Args:
        name: the packaged model's name.
        version: version of the recipe; it changes with anything that changes the weights.
        epochs: number of passes over the training images.
        batch_size: images of a step.
        lr: largest learning rate of AdamW; it rises in the first tenth of the steps, and falls along a cosine.
        weight_decay: AdamW's, for weights of two and more dimensions.
        shift: largest number of pixels by which an image is moved, up, down, left and right; drawn for each image.
        train: the first images of the training set that are trained on. The others are for federations.
        test: the first images of the test set that the accuracy is measured on.
        seed: seed of the weights, the order of images, and their shifts.
    """

    name: str
    version: str
    epochs: int
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    shift: int = 2
    train: int = 30_000
    test: int = 2_000
    seed: int = 0


CLASSES = 10
SIZE = 28  # height and width of an image


def make(
    recipe: Recipe,
    body: Callable[[], PreTrainedModel],
    pooled: Callable[[Tensor], Tensor],
    *,
    source: Path,
    folder: Path,
    say: Say,
) -> None:
    """Train a model's body below a linear layer for the classes, and save the body alone, with an image processor.

    Args:
        recipe: how it is trained.
        body: makes the untrained body.
        pooled: from the body's tokens [rows, tokens, hidden_size] to the last layer's input [rows, hidden_size].
        source: folder of the packaged set `fashion-mnist`.
        folder: the folder to fill.
        say: called with a line about the progress every few seconds.

    Raises:
        OSError, ValueError: the set cannot be read.
    """
    started = time.perf_counter()
    images, labels = read(source / "train-images-idx3-ubyte.gz", recipe.train)
    with torch.random.fork_rng(devices=[]):  # transformers and torch draw first weights from the global generator
        torch.manual_seed(recipe.seed)
        model = body()
        head = nn.Linear(model.config.hidden_size, CLASSES)
    classify = _Classifier(model, pooled, head)
    _train(classify, recipe, images, labels, say)
    images, labels = read(source / "t10k-images-idx3-ubyte.gz", recipe.test)
    accuracy = _accuracy(classify, images, labels)
    model.save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    processor.save_pretrained(folder)
    seconds = time.perf_counter() - started
    (folder / "README.md").write_text(_about(recipe, model, accuracy, seconds), encoding="utf-8")
    say(f"{recipe.name}: trained in {seconds:.0f} s, accuracy {accuracy:.3f} on {recipe.test:,} test images")


class _Classifier(nn.Module):
    """Images of bytes [rows, 28, 28] to logits [rows, classes]."""

    def __init__(self, body: PreTrainedModel, pooled: Callable[[Tensor], Tensor], head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head, self._pooled = body, head, pooled

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self._pooled(self.body(pixel_values=pixels(images)).last_hidden_state))


def pixels(images: Tensor) -> Tensor:
    """Grey images of bytes [rows, height, width] as the image processor gives them: RGB, from -1 to 1."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def read(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a file, uint8 [count, 28, 28], and their classes [count]."""
    images, labels = read_idx(path)
    return torch.from_numpy(images[:count].copy()), torch.from_numpy(np.array(labels[:count], dtype=np.int64))


def _train(classify: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, say: Say) -> None:
    def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
        moved = shifted(images[rows], recipe.shift, generator)
        return F.cross_entropy(classify(moved), labels[rows], label_smoothing=0.1)

    descend(classify, recipe, len(images), loss_of, say=say)


def descend(
    model: nn.Module,
    recipe: Recipe,
    count: int,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    *,
    say: Say,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train all parameters of a model in place by the recipe.

    Args:
        model: the model.
        recipe: how it is trained.
        count: number of training images.
        loss_of: from the numbers of a step's images, and the generator of all that is drawn, to the loss.
        say: called with a line about the progress every few seconds.
        after: called after each step.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (count // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    said = time.monotonic()
    model.train()
    for step, rows in enumerate(_batches(count, recipe, generator), 1):
        loss = loss_of(rows, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        after()
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            say(f"training {recipe.name}: step {step} of {steps}, loss {loss.item():.2f}")


def _batches(count: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of each step; those that fill no batch at the end of an epoch are left out."""
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % recipe.batch_size].split(recipe.batch_size)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images [rows, height, width], each moved by up to `most` pixels in both directions and mirrored or not.

    What comes in at the sides is 0. All is drawn for each image apart.
    """
    rows, height, width = images.shape
    wide = F.pad(images, (most, most, most, most))
    down, right = torch.randint(2 * most + 1, (2, rows, 1), generator=generator)
    mirror = torch.randint(2, (rows, 1), generator=generator).bool()
    columns = torch.arange(width)
    columns = torch.where(mirror, columns.flip(0), columns) + right
    lines = torch.arange(height) + down
    return wide[torch.arange(rows)[:, None, None], lines[:, :, None], columns[:, None, :]]


@torch.no_grad()
def _accuracy(classify: nn.Module, images: Tensor, labels: Tensor) -> float:
    classify.eval()
    hits = [classify(part).argmax(1) == own for part, own in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(hits).float().mean().item()


def _about(recipe: Recipe, model: PreTrainedModel, accuracy: float, seconds: float) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"""# {recipe.name}

A {type(model).__name__} of {parameters:,} parameters for RGB images of {SIZE} x {SIZE} pixels. FedLoRA trained it on
this machine, as a classifier, on the first {recipe.train:,} training images of Fashion-MNIST (MIT licence). The last
layer is left out, so that a classifier that starts here has a fresh one.

- recipe: version {recipe.version}, {recipe.epochs} epochs, batches of {recipe.batch_size}, seed {recipe.seed}
- accuracy with the last layer, on the first {recipe.test:,} test images: {accuracy:.4f}
- trained in {seconds:.0f} s with torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}

Weights that two machines make can differ. Machines of one federation need the same bits: copy this
folder to all of them, and name it as `model.name`.
"""
