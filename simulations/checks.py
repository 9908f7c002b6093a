"""Checks before a simulation, for faults that all its clients would have; they are reported once, before it begins."""

from __future__ import annotations

import functools

from transformers import PreTrainedTokenizerBase

from fedlora.common import given
from fedlora.common.errors import ConfigError, DataError, ModelError
from fedlora.config import Config, LoraConfig, ModelConfig, client_rank
from fedlora.data import encode, form_of, prepare, usable_rows
from fedlora.data.checked import warn_of_lengths
from fedlora.data.values import rows_by_value
from fedlora.models import base_fingerprint, injection, pad_id, pick_device, tokenizer_of
from fedlora.results.run_folder import check_changes, folder_of, stored
from fedlora.tasks.checked import check_batch
from fedlora.tasks.registry import check_task

from ..clients.optimizers.registry import check as check_optimizer
from ..clients.training.private import check_optimizer as check_passes
from ..strategies.checks.clients import check_evaluation, check_places, simulated
from ..strategies.checks.privacy import check_private
from ..strategies.configured import configured
from ..strategies.initializers.registry import initializer
from ..strategies.registry import naming_others
from ..strategies.schedules.registry import SCHEDULES
from ..strategies.server import overlapping

_ASKED = 8  # number of clients whose first row is tried


def check(config: Config) -> None:
    """Check everything that needs no weights: the configuration, the data, the base model's files and its modules.

    Raises:
        FedLoraError: no client could take part, or changed keys would make the run to resume another run.
    """
    for key, name, error in (
        ("data.source", config.data.source, DataError),
        ("model.name", config.model.name, ModelError),
    ):
        if given.is_given(name):
            given.find(name, key, error)
    if config.run.resume:
        check_changes(stored(folder_of(config)), config)
    task = check_task(config)
    strategy = configured(config)
    check_evaluation(config, strategy)
    check_private(strategy, config)
    if SCHEDULES.make(config.federation.schedule, config.federation.schedule_options).overlaps:
        overlapping.check(strategy, config)
    check_optimizer(config.train, pick_device(config.model.device))
    if config.privacy.level == "example":
        check_passes(config.train)
    tokenizer, base = _looked_at(config.model, config.lora)
    _check_widths(config, base)
    if not config.run.resume:
        with naming_others():
            start = initializer(config.lora, strategy)
        start.check(base, base_fingerprint(config.model))
    split = prepare(config)
    form_of(split.rows.column_names, config.data, task)
    if config.evaluate.by:
        rows_by_value(split.heldout, config.evaluate.by, config.data)
    warn_of_lengths(split.rows, tokenizer, config.data, task)
    faults: list[DataError] = []
    asked = split.parts[:_ASKED]
    for part in asked:
        rows = split.rows.select(part[:1])
        try:
            if usable_rows(rows, tokenizer, config.data, task):
                examples = encode(rows, tokenizer, config.data, task)
                check_batch(task, task.collate(examples, pad_id(tokenizer)), len(examples))
        except DataError as error:
            faults.append(error)
    if len(faults) == len(asked):
        raise faults[0]


def _check_widths(config: Config, base: injection.Shapes) -> None:
    """Raise ConfigError if a client's rank is larger than every adapted layer can use, its min(d_out, d_in)."""
    widest = max(min(shape) for shape in base.lora.values())
    for client in range(config.federation.clients):
        rank = client_rank(config.lora, client)
        if rank > widest:
            raise ConfigError(
                f"lora.ranks: client {client}'s rank {rank} is above {widest}, the largest rank that an adapted layer "
                f"of {config.model.name} can use; lower it"
            )
    check_places(simulated(config), config.lora, base.lora)


@functools.lru_cache(maxsize=2)
def _looked_at(model: ModelConfig, lora: LoraConfig) -> tuple[PreTrainedTokenizerBase, injection.Shapes]:
    """The base model's tokenizer and shapes, after a check that it is there and has the modules to adapt."""
    base_fingerprint(model)
    base = injection.shapes(model, lora)
    return tokenizer_of(model), base
