"""Training data: from a source to rows, their partition among the clients, examples, and batches.

Importing this package is cheap: datasets, pyarrow and torch are loaded by the functions that use them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from fedlora.config import Config, DataConfig, client_parts

from .batches import batch_at, collate, eval_batches
from .classes import class_names
from .examples import Example
from .forms import RowReader, encode, form_of, usable_rows
from .lazy import LazyExamples
from .partition import Split, client_split, joined, kept_back, most_kept_back, split_rows
from .sources import PACKAGED, load_rows
from .stats import ClientStatistics, client_statistics

__all__ = [
    "PACKAGED",
    "ClientStatistics",
    "Example",
    "LazyExamples",
    "RowReader",
    "Split",
    "batch_at",
    "class_names",
    "client_split",
    "client_statistics",
    "collate",
    "encode",
    "eval_batches",
    "form_of",
    "kept_back",
    "load_rows",
    "most_kept_back",
    "prepare",
    "split_rows",
    "usable_rows",
]


def prepare(config: Config) -> Split:
    """The rows of `data.source`, divided among the clients; cached, since clients in one process share them.

    Raises:
        DataError: the source cannot be read, or cannot be divided among so many clients.
        AssetError: a packaged set cannot be fetched.
    """
    if not config.data.parts:
        return _prepare(config.data, config.federation.clients, config.run.seed)
    groups, dealt = client_parts(config.data, config.federation.clients)
    return joined(_prepare(replace(config.data, parts=""), dealt, config.run.seed), groups)


@lru_cache(maxsize=2)
def _prepare(data: DataConfig, clients: int, seed: int) -> Split:
    return split_rows(load_rows(data), data, clients, seed)
