"""Numbers about each client's rows, for `fedlora data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlora.config import DataConfig

from .conversations import conversation, text
from .forms import RowReader, each, form_of
from .partition import Split

_CLASSES = ("label", "image")  # forms of rows that have a class


@dataclass(frozen=True)
class ClientStatistics:
    """Numbers about one client's rows.

    Args:
        client_id: number of the client, from 0.
        name: the client's natural key; empty for other partitions.
        rows: number of the client's rows, with its own test rows.
        mean_characters: mean number of characters of prompt and response, of all messages, or of the text; images: 0.
        labels: for classification, name or number of each class -> number of its rows; else empty.
    """

    client_id: int
    name: str
    rows: int
    mean_characters: float
    labels: Mapping[str, int]


def client_statistics(split: Split, data: DataConfig, task: RowReader) -> list[ClientStatistics]:
    """The numbers of every client, in order.

    Args:
        split: the run's split, from `prepare`.
        data: the run's section data.
        task: the run's task.

    Raises:
        DataError: a column is missing, or the form does not fit the task.
    """
    form = form_of(split.rows.column_names, data, task)
    characters = np.array(_characters(split, form, data), dtype=np.int64)
    labels = np.array(_label_names(split, data) if form in _CLASSES else [])
    return [
        ClientStatistics(
            client_id=client,
            name=split.names[client] if split.names else "",
            rows=len(part),
            mean_characters=float(characters[part].mean()),
            labels=_counts(labels[part]) if form in _CLASSES else {},
        )
        for client, part in enumerate(split.parts)
    ]


def _characters(split: Split, form: str, data: DataConfig) -> list[int]:
    """The number of characters of each row's text or messages; 0 for an image, or a row that cannot be read."""
    if form == "image":
        return [0] * len(split.rows)
    plain = replace(data, system_prompt="")

    def count(row: Mapping[str, Any]) -> int:
        if form in ("text", "label"):
            return len(text(row, data.text_column))
        return sum(len(message["content"]) for message in conversation(row, form, plain).messages)

    return [found or 0 for found in each(split.rows, count)[0]]


def _label_names(split: Split, data: DataConfig) -> list[str]:
    """The class of each row: its name, or its number if the column has no names."""
    cells = split.rows.select_columns([data.label_column])[:][data.label_column]
    names = getattr(split.rows.features[data.label_column], "names", None)
    return ["(none)" if cell is None else names[cell] if names else str(cell) for cell in cells]


def _counts(labels: np.ndarray) -> dict[str, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
