"""A client's own rows as training and test examples."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from flwr.app import Context

from fedlora.common.errors import DataError
from fedlora.config import Config
from fedlora.data import LazyExamples, client_split, kept_back, prepare
from fedlora.data.checked import warn_of_lengths
from fedlora.models import shared_tokenizer
from fedlora.tasks.registry import task_of

from ..node import rules
from ..node.rules import client_id_of
from ..training import schedule

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger("fedlora")


def training_examples(config: Config, context: Context) -> LazyExamples:
    """This client's training examples, each of which is encoded when it is first used.

    Raises:
        DataError: none of the client's rows has anything to predict.
    """
    examples = train_and_test(config, client_id_of(context), rules.own_data(context.node_config))[0]
    if not examples:
        raise DataError(examples.left_out)
    return examples


def train_rows(config: Config, client_id: int, own_data: str) -> int:
    """The number of this client's training rows. No row is read, since most of many clients are never asked."""
    rows = prepare(config).count(0 if own_data else client_id)
    return rows - kept_back(rows, _test_fraction(config))


def _test_fraction(config: Config) -> float:
    return config.data.client_test_fraction if config.evaluate.clients else 0.0


def divided(rows: Dataset, config: Config, client_id: int) -> tuple[Dataset, Dataset]:
    """A client's rows as (training rows, test rows)."""
    return client_split(rows, _test_fraction(config), schedule.hash_seed(config.run.seed, client_id))


@functools.lru_cache(maxsize=64)
def train_and_test(config: Config, client_id: int, own_data: str) -> tuple[LazyExamples, LazyExamples]:
    """This client's training and test examples."""
    tokenizer = shared_tokenizer(config.model)
    rows = prepare(config).client(0 if own_data else client_id)
    task = task_of(config.model)
    found = [LazyExamples(part, tokenizer, config.data, task) for part in divided(rows, config, client_id)]
    if own_data:  # rows that only this node has seen
        warn_of_lengths(rows, tokenizer, config.data, task)
    for examples in found:
        if examples and examples.left_out:
            _log.warning("client %d: %s", client_id, examples.left_out)
    return found[0], found[1]
