"""The check of a node without a server: its config, and its rows as a run would use them."""

from __future__ import annotations

from collections.abc import Mapping

from fedlora.common.errors import DataError
from fedlora.config import Config, Scalar
from fedlora.data import kept_back, prepare
from fedlora.data.checked import report
from fedlora.models import at_hand, tokenizer_of
from fedlora.tasks.registry import check_task

from ..node import rules
from ..training import schedule


def check(config: Config, settings: Mapping[str, Scalar]) -> list[str]:
    """What a node would do in a run, as lines to print.

    Args:
        config: the run's configuration.
        settings: the node's own config.

    Raises:
        ConfigError: a key of the node's config refuses the run, or is wrong itself; the message names the key.
        DataError: rows cannot be used; the message says which.
    """
    rules.check(settings)
    config = rules.ruled(config, settings)
    own, said = rules.own_data(settings), []
    clients = rules.hosted(settings) or (int(settings.get("partition-id", 0)),)
    task = check_task(config)
    tokenizer = tokenizer_of(config.model) if at_hand(config.model.name) else None
    for client in clients:
        rows = prepare(config).client(0 if own else client)
        kept = kept_back(len(rows), config.data.client_test_fraction) if config.evaluate.clients else 0
        steps = schedule.steps_per_round(config.train, len(rows) - kept)
        rules.check_steps(config.train, settings, steps)
        rank = rules.rank(config, settings, client)
        said.append(f"client {client}: rank {rank}, {len(rows) - kept} training rows, {steps} steps in a round")
        found, fault = report(rows, tokenizer, config.data, task, config.model.name)
        said += [f"  {line}" for line in found]
        if fault:
            raise DataError(fault)
    return said
