"""One cell of a comparison: its runs, and the scores of their models on rows that no client trained on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdapterState
from fedlora.adapters.algebra import singular_values
from fedlora.common.errors import RunError
from fedlora.config import Config, EvaluateConfig, FederationConfig, RunConfig, client_parts, client_rank
from fedlora.data import client_statistics, encode, prepare, usable_rows
from fedlora.data.values import rows_by_value
from fedlora.models import adapted, injection
from fedlora.results.environment import code_version, device_facts, versions
from fedlora.results.run_folder import folder_of
from fedlora.tasks.by_value import named, scored
from fedlora.tasks.predict import predict
from fedlora.tasks.registry import task_of
from fedlora.tasks.scores import Predictions, scores

from ...clients.node import own_state
from ...strategies.allocations.registry import Ranks
from ...strategies.checks.clients import simulated
from ...strategies.configured import configured
from ...strategies.initializers.uniform import seeded
from ...strategies.server import saved_state
from .. import personal
from .. import run as simulation
from .grid import PLACES, SCHEMA, Cell

# Examples, the number of each one's owner, and value of evaluate.by -> numbers of its examples.
_Rows = tuple[list[Any], torch.Tensor, dict[str, np.ndarray]]


def run(cell: Cell, work: Path) -> dict[str, Any]:
    """Train and score one cell.

    Args:
        cell: the cell, with the configs of its runs, which do not say where to write.
        work: folder for the cell's runs, which is emptied first.

    Returns:
        The content of the cell's JSON file, without the cell's place in the grid.

    Raises:
        FedLoraError: a run failed.
    """
    began = time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    records: list[dict[str, Any]] = []
    learned: list[AdapterState] = []
    config = cell.configs[0]
    if cell.label == "base":
        learned = [seeded(config, simulated(config))]
    else:
        for number, each in enumerate(cell.configs):
            # if a client diverges at a learning rate, this is a result too, which the score shows
            everyone = replace(each.federation, lost_clients="accept")
            here = replace(each.run, dir=str(work), name="run", id=str(number), resume=False)
            placed = replace(each, run=here, federation=everyone)
            simulation.in_process(placed)
            folder = folder_of(placed)
            records.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
            learned += _learned(placed, folder, records[-1]["key"])
    one = len(learned) == 1 and cell.label != "base"
    return {
        "schema": SCHEMA,
        "status": "completed",
        "config": cell.keys(),
        "runs": [_placeless(record) for record in records],
        "scores": _scores(config, learned),
        "spectra": singular_values(learned[0]) if one else {},
        "partition": {"clients": _partition(cell)},
        "code": code_version(),
        "versions": versions(),
        "device": device_facts(config),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _learned(config: Config, folder: Path, key: str) -> list[AdapterState]:
    """The global adapter of a finished run; if its strategy has personal factors, each client's own adapter.

    Raises:
        RunError: the run left no saved state.
    """
    strategy, found = configured(config), saved_state.load(folder / "state", key)
    if found is None:
        raise RunError(f"{folder / 'state'}: no saved state of a finished run")
    state, _ = found
    if not strategy.personal:
        return [strategy.global_adapter(state)]
    learned = saved_state.load_learned(folder / "state", key)
    ranks = Ranks.of(config.lora, injection.shapes(config.model, config.lora).lora, learned)
    clients = [ranks.give(client) for client in simulated(config)]
    own = {client.client_id: own_state.folder_of(folder / "clients", key, client.client_id) for client in clients}
    # For a client that was never asked, take the adapter that it would be sent.
    return [
        personal.model(strategy, state, client, own[client.client_id]) or strategy.broadcast(state, client, 1).adapter
        for client in clients
    ]


def _scores(config: Config, learned: Sequence[AdapterState]) -> dict[str, dict[str, Any]]:
    """Metrics on validation and test rows, of the one model or as means over the clients' own models.

    With a natural partition, `clients` has the metrics of each client's model on the rows with that client's key. With
    `evaluate.by`, `by` has the metrics of the rows with each value, and there are means and worst values over these.
    """
    model = adapted.adapted_model(config.model, config.lora)
    adapted.place(model, (), config.anchor, "scores")
    deal = replace(config.data, parts="")
    _, clients = client_parts(config.data, config.federation.clients)
    sets = _held_out(replace(config, data=deal, federation=replace(config.federation, clients=clients)))
    found: dict[str, dict[str, Any]] = {}
    for name, (examples, owners, groups) in sets.items():
        made: list[Predictions] = []
        for adapter in learned:
            adapted.install(model, adapter)
            made.append(predict(model.task, model.model, examples, config.evaluate.batch_size, model.base.pad_id))
        each = [scored(model.task, one, config.evaluate.by, groups) for one in made]
        found[name] = _mean([{**one.metrics, **named(one.by)} for one in each])
        found[name] |= {"examples": len(examples), "clients": {}}
        if groups:
            values = {
                value: {**_mean([one.by["values"][value] for one in each]), "rows": len(rows)}
                for value, rows in groups.items()
            }
            found[name]["by"] = {"column": config.evaluate.by, "values": values}
        for client in range(clients) if len(owners) else ():
            rows = (owners == client).nonzero()[:, 0]
            if len(rows):
                own = made[client % len(made)]
                found[name]["clients"][str(client)] = {**scores(model.task, own, rows), "examples": len(rows)}
    return found


@lru_cache(maxsize=2)
def _rows(config: Config) -> dict[str, _Rows]:
    data, by = config.data, config.evaluate.by
    loaded = adapted.adapted_model(config.model, config.lora)
    split, tokenizer, task = prepare(config), loaded.base.tokenizer, loaded.task
    if not len(split.test):
        raise RunError(f"data.test-fraction = {data.test_fraction} leaves no rows to test on; raise it")
    found: dict[str, _Rows] = {}
    for name, rows, owners in zip(("validation", "test"), (split.heldout, split.test), split.owners, strict=True):
        usable = usable_rows(rows, tokenizer, data, task) if len(owners) or by else []
        examples = encode(rows, tokenizer, data, task)
        groups = rows_by_value(rows.select(usable), by, data) if by else {}
        found[name] = (examples, torch.from_numpy(owners[usable] if len(owners) else owners), groups)
    return found


def _held_out(config: Config) -> dict[str, _Rows]:
    """The validation and test rows, encoded once for all cells that share them."""
    return _rows(
        Config(
            model=config.model,
            lora=replace(config.lora, ranks="", rank=1),
            data=config.data,
            federation=FederationConfig(clients=config.federation.clients),
            evaluate=EvaluateConfig(by=config.evaluate.by),
            run=RunConfig(seed=config.run.seed),
        )
    )


def _partition(cell: Cell) -> list[dict[str, Any]]:
    """Each client's numbers of rows by class, in this scenario's federation."""
    found = []
    for config in cell.configs:
        for row in client_statistics(prepare(config), config.data, task_of(config.model)):
            rank = client_rank(config.lora, row.client_id)
            labels = dict(row.labels)
            found.append({"client-id": len(found), "name": row.name, "rank": rank, "rows": row.rows, "labels": labels})
    return found


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in metrics) for name in metrics[0]}


def _placeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's record without the keys that say where it was written."""
    return {**record, "config": {key: value for key, value in record["config"].items() if key not in PLACES}}
