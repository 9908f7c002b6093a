"""What goes wrong for all clients of a simulation alike: said once, before the run, which leaves nothing behind."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerBase

from fedlora import peft_io
from fedlora.config import Config, LoraConfig, ModelConfig
from fedlora.data import encode, form_of, prepare, usable_rows
from fedlora.data.checked import warn_of_lengths
from fedlora.errors import DataError, FedLoraError
from fedlora.models import base_fingerprint, pick_device, tokenizer_of
from fedlora.results import check_changes, folder_of, stored

from .grid import Grid

_ASKED = 8  # clients whose first row stands for all rows


def check(config: Config) -> None:
    """Look at the data, the base and its modules, as far as no weights are needed.

    Raises:
        FedLoraError: none of the clients could do anything, or the run to resume would become another one.
    """
    if config.run.resume:
        check_changes(stored(folder_of(config)), config)
    pick_device(config.model.device)
    split = prepare(config)
    form_of(split.rows.column_names, config.data, config.model.task)
    tokenizer = _looked_at(config.model, config.lora)
    warn_of_lengths(split.rows, tokenizer, config)
    faults: list[DataError] = []
    asked = split.parts[:_ASKED]
    for part in asked:
        rows = split.rows.select(part[:1])
        try:
            if usable_rows(rows, tokenizer, config.data, config.model.task):
                encode(rows, tokenizer, config.data, config.model.task, config.model.labels)
        except DataError as error:
            faults.append(error)
    if len(faults) == len(asked):
        raise faults[0]


def check_scenarios(grid: Grid) -> None:
    """What goes wrong in all scenarios of a comparison alike; a fault of one is its own cells'.

    Raises:
        FedLoraError: the first one's, where none of them could be run.
    """
    first = {cell.scenario: cell.configs[0] for cell in reversed(grid.cells)}
    faults: list[FedLoraError] = []
    for scenario in grid.scenarios:
        try:
            check(first[scenario])
        except FedLoraError as error:
            faults.append(error)
    if len(faults) == len(grid.scenarios):
        raise faults[0]


@functools.lru_cache(maxsize=2)
def _looked_at(model: ModelConfig, lora: LoraConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, once the base is there and has the modules that are to be adapted."""
    base_fingerprint(model)
    peft_io.shapes(model, lora)
    return tokenizer_of(model)
