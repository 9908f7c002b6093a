"""The packaged model `fashion-clip`: a small CLIP, trained on images of clothes and on captions made of their names."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedlora.common.assets import Say

from .training import SIZE, Recipe, descend, pixels, read

_RECIPE = Recipe(name="fashion-clip", version="1", epochs=8, test=10_000)
# What captions call each class, in the order of the set's classes. The first is the set's own name.
NAMES = (
    ("t-shirt/top", "t-shirt", "top", "tee"),
    ("trouser", "pair of trousers", "pair of pants"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown"),
    ("coat", "jacket"),
    ("sandal", "open shoe"),
    ("shirt", "blouse"),
    ("sneaker", "trainer", "running shoe"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot"),
)
TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a small grey image of a {}",
    "this is a {}",
    "an item in a shop: {}",
    "a drawing of a {}",
)
_MORE_WORDS = "an the one of in on with and image photo piece clothing clothes shoe wear black white dark light"
_SPECIAL = ("<|pad|>", "<|start|>", "<|unknown|>", "<|end|>")
_TOKENS = 16  # most tokens of a caption
_LARGEST_SCALE = 100.0  # of the logits, as in CLIP


def make(source: Path, folder: Path, say: Say) -> None:
    """Train the model on images of the set in `source`, and fill `folder` with it, a tokenizer and an image processor.

    Args:
        source: folder of the packaged set `fashion-mnist`.
        folder: the folder to fill.
        say: called with a line about the progress every few seconds.

    Raises:
        OSError, ValueError: the set cannot be read.
    """
    began = time.perf_counter()
    words = tokenizer()
    images, labels = read(source / "train-images-idx3-ubyte.gz", _RECIPE.train)
    model = _trained(words, images, labels, say)
    images, labels = read(source / "t10k-images-idx3-ubyte.gz", _RECIPE.test)
    accuracy = _accuracy(model, words, images, labels)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    seconds = time.perf_counter() - began
    (folder / "README.md").write_text(_about(model, accuracy, seconds), encoding="utf-8")
    say(f"fashion-clip: trained in {seconds:.0f} s, zero-shot accuracy {accuracy:.3f} on {_RECIPE.test:,} test images")


def tokenizer() -> Any:
    """One token for each word of the captions and each mark between them; a start and an end token around them."""
    text = " ".join([*(name for names in NAMES for name in names), *TEMPLATES, _MORE_WORDS, "- / : ,"])
    split = pre_tokenizers.Whitespace()
    found = sorted({word for word, _ in split.pre_tokenize_str(text.replace("{}", " "))})
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *found])}
    made = Tokenizer(WordLevel(vocabulary, unk_token=_SPECIAL[2]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = split
    start, end = ((token, vocabulary[token]) for token in (_SPECIAL[1], _SPECIAL[3]))
    made.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    pad, start_token, unknown, end_token = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        bos_token=start_token,
        unk_token=unknown,
        eos_token=end_token,
        model_max_length=_TOKENS,
    )


def untrained(words: Any) -> CLIPModel:
    """The model before training: 4 layers of width 96 on patches of 7 x 7 pixels, and 2 layers of width 64 on words.

    Args:
        words: the tokenizer.
    """
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = CLIPConfig(
        vision_config=vision | {"image_size": SIZE, "patch_size": 7},
        text_config=text | tokens | {"vocab_size": len(words), "max_position_embeddings": _TOKENS},
        projection_dim=64,
    )
    return CLIPModel(config)


def _trained(words: Any, images: Tensor, labels: Tensor, say: Say) -> CLIPModel:
    """The trained model.

    Each step draws one caption for each class: one of its names in one of the templates. All images of a class belong
    to its caption (Yang et al. 2022, "Unified Contrastive Learning", https://arxiv.org/abs/2204.03610).
    """
    captions = [_ids(words, [form.format(name) for form in TEMPLATES for name in names]) for names in NAMES]
    with torch.random.fork_rng(devices=[]):  # transformers draws first weights from the global generator
        torch.manual_seed(_RECIPE.seed)
        model = untrained(words)

    def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(len(captions), generator=generator).tolist()
        texts = torch.stack([of[int(at * len(of))] for at, of in zip(drawn, captions, strict=True)])
        return _contrast(model, _moved(images[rows], generator), labels[rows], texts, words.pad_token_id)

    @torch.no_grad()
    def bound() -> None:
        model.logit_scale.clamp_(max=float(np.log(_LARGEST_SCALE)))

    descend(model, _RECIPE, len(images), loss_of, say=say, after=bound)
    return model.eval()


def _ids(words: Any, texts: list[str]) -> Tensor:
    """The tokens of texts, int64 [texts, 16]."""
    return words(texts, padding="max_length", return_tensors="pt")["input_ids"]


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by a few pixels, all of them alike, and each of them mirrored or not."""
    down, right = torch.randint(-_RECIPE.shift, _RECIPE.shift + 1, (2,), generator=generator).tolist()
    mirror = torch.randint(2, (len(images), 1, 1), generator=generator).bool()
    return torch.where(mirror, images.flip(2), images).roll((down, right), (1, 2))


def _contrast(model: CLIPModel, images: Tensor, labels: Tensor, texts: Tensor, pad: int) -> Tensor:
    """The mean of two cross-entropies: of each image over the captions, and of each class's caption over the images,
    where all images of the class have the same share of the target.

    Args:
        model: the model.
        images: uint8 [rows, 28, 28].
        labels: their classes, int64 [rows].
        texts: a caption for each class, int64 [classes, tokens].
        pad: the token that fills up shorter captions.
    """
    texts = texts[:, : int((texts != pad).sum(1).max())]
    out = model(pixel_values=pixels(images), input_ids=texts, attention_mask=(texts != pad).long())
    logits = cast("Tensor", out.logits_per_image)
    of_class = F.one_hot(labels, len(texts)).T.float()
    shares = of_class / of_class.sum(1, keepdim=True).clamp(min=1)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, shares)) / 2


@torch.no_grad()
def _accuracy(model: CLIPModel, words: Any, images: Tensor, labels: Tensor) -> float:
    """The share of images whose own class has the nearest of the prompts "a photo of a …"."""
    prompts = words([f"a photo of a {names[0]}" for names in NAMES], padding=True, return_tensors="pt")
    hits = [
        cast("Tensor", model(pixel_values=pixels(part), **prompts).logits_per_image).argmax(1) == own
        for part, own in zip(images.split(500), labels.split(500), strict=True)
    ]
    return torch.cat(hits).float().mean().item()


def _about(model: CLIPModel, accuracy: float, seconds: float) -> str:
    return f"""# fashion-clip

A CLIPModel of {sum(p.numel() for p in model.parameters()):,} parameters for RGB images of {SIZE} x {SIZE} pixels and
texts of up to {_TOKENS} tokens. FedLoRA trained it on this machine on the first {_RECIPE.train:,} training images of
Fashion-MNIST (MIT licence), with captions made of the names of the classes and some other names for them.

- recipe: version {_RECIPE.version}, {_RECIPE.epochs} epochs, batches of {_RECIPE.batch_size}, seed {_RECIPE.seed}
- accuracy of "a photo of a …" on the {_RECIPE.test:,} test images: {accuracy:.4f}
- trained in {seconds:.0f} s with torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}

The tokenizer knows the words of the captions alone; all others are one unknown token.

Weights that two machines make can differ. Machines of one federation need the same bits: copy this
folder to all of them, and name it as `model.name`.
"""
