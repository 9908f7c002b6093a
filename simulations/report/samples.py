"""The section of a run on images with samples of each client's rows, which are read again from the run's source."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.common.errors import FedLoraError
from fedlora.config import Config, parse
from fedlora.data import form_of, prepare
from fedlora.data.conversations import RowError
from fedlora.data.images import decoded
from fedlora.data.values import texts_of
from fedlora.tasks.registry import task_of

from .figures.samples import Sample, Strip, strips
from .page import Section

_TITLE = "Samples"
_MOST_CLIENTS = 12
_PIXELS = 64  # largest width and height of a sample, so that a page stays small


def section(run: Mapping[str, Any], count: int) -> Section | None:
    """The first images of each client; of very many clients, those of the first ones.

    Args:
        run: the content of result.json.
        count: largest number of images of each client; 0: no section.

    Returns:
        A section with one figure, or with a sentence about why there is none; None for a run that is not on images.
    """
    try:
        config = parse(run.get("config", {}), where="result.json")
        on_images = "image" in task_of(config.model).forms
    except FedLoraError:
        return None  # a run of another version, or on a task that is not on this machine
    if not on_images or not count:
        return None
    if not run.get("simulated"):
        return _without(
            "they are shown of simulations in one process alone, whose rows belong to the user of this machine. In a "
            "deployment, the clients' images never leave their nodes"
        )
    try:
        found = _strips(config, count)
    except FedLoraError as error:
        return _without(f"the rows cannot be read again on this machine: {error}")
    if not any(strip.samples for strip in found):
        return _without("the rows hold no image that can be read on this machine")
    clients = config.federation.clients
    more = f" The first {len(found)} of {clients} clients." if len(found) < clients else ""
    said = (
        "The images were read again from data.source for this page. To leave them out of a page that you pass on: "
        "fedlora report --samples 0."
    )
    return Section(_TITLE, pictures=[strips(found, config.evaluate.by, more)], absent=[said])


def forget(out: Path) -> None:
    """Remove the images that an earlier report wrote into this folder, which the next one may have to leave out."""
    for path in (out / "figures").glob("samples.*"):
        path.unlink()


def _without(why: str) -> Section:
    return Section(_TITLE, absent=[f"No samples of the clients' images: {why}."])


def _strips(config: Config, count: int) -> list[Strip]:
    """The samples of each client.

    Raises:
        FedLoraError: the rows cannot be read, or are no longer rows of images.
    """
    data, by = config.data, config.evaluate.by
    split = prepare(config)
    form_of(split.rows.column_names, data, task_of(config.model))
    classes = getattr(split.rows.features[data.label_column], "names", None)
    found: list[Strip] = []
    for client, part in enumerate(split.parts[:_MOST_CLIENTS]):
        rows = split.client(client)
        groups = texts_of(rows, by, data) if by and by != data.label_column else [""] * len(rows)
        usable = (
            Sample(int(part[at]) + 1, image, str(classes[label] if classes else label), str(groups[at]))
            for at in range(len(rows))
            if (label := rows[at][data.label_column]) is not None
            and (image := _small(rows[at][data.image_column])) is not None
        )
        found.append(Strip(client, split.names[client] if split.names else "", tuple(islice(usable, count))))
    return found


def _small(cell: Any) -> np.ndarray | None:
    """An image of at most 64 x 64 pixels, uint8 [height, width, 3]; None if it cannot be read."""
    try:
        image = decoded(cell)
    except RowError:
        return None
    image.thumbnail((_PIXELS, _PIXELS))
    return np.asarray(image)
