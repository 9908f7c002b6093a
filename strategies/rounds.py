"""The round loop: sample, broadcast, collect, aggregate, evaluate, record. The same for every engine."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from flwr.serverapp import Grid

from fedlora import peft_io
from fedlora.adapter import AdapterState, concatenate, ideal, initial, relative_error
from fedlora.config import Config
from fedlora.data import Example, encode, prepare
from fedlora.errors import RunError
from fedlora.evaluate import evaluate
from fedlora.events import emit
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.models import base_fingerprint
from fedlora.results import RunRecord

from .base import ServerState, Strategy
from .collect import TrainRound, evaluate_on_clients, meet
from .folds import Folds
from .registry import configured

# The error against the ideal needs every update at once; with more clients than this, memory matters more.
_MAX_DIAGNOSED = 64


def run(grid: Grid, config: Config, record: RunRecord, run_id: int) -> AdapterState:
    """Run a whole federation and return everything that it learned, as one adapter on the untouched base.

    `record` keeps the adapter and the numbers of every complete round, and so survives an interruption.

    Raises:
        RunError: fewer clients than `federation.min-clients` connected, or answered a round.
        StrategyError: the strategy cannot serve these clients.
    """
    fingerprint = base_fingerprint(config.model)
    strategy = configured(config)
    roster = meet(grid, config, fingerprint)
    clients = list(roster.infos.values())
    strategy.check(clients)
    state = strategy.init(start(config, clients))
    record.start(clients, fingerprint)
    judge = Judge(config, run_id) if config.evaluate.server else None
    if judge:
        baseline = judge(strategy, state)
        record.baseline(baseline)
        emit("baseline", metrics=baseline)
    for number in range(1, config.federation.rounds + 1):
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        chosen = sample(list(roster.infos), config.federation.fraction, config.run.seed, number)
        emit("round-start", round=number, rounds=config.federation.rounds, clients=len(chosen))
        this = TrainRound(
            grid,
            config,
            fingerprint,
            roster,
            number,
            make_broadcast=lambda client, state=state, number=number: strategy.broadcast(state, client, number),
            keep=len(chosen) <= _MAX_DIAGNOSED,
        )
        before, state = state, _aggregate(strategy, state, this, chosen, seconds)
        with _clock(seconds, "diagnose"):
            error = aggregation_error(before, state, this.kept) if this.keep else None
        entry: dict[str, object] = {
            "round": number,
            "train-loss": this.mean("train-loss"),
            "clients": dict(sorted(this.answers.items())),
            "failures": this.failures,
            "upload-bytes": this.upload_bytes,
            "download-bytes": this.download_bytes,
            "aggregation-error": error,
        }
        if number == config.federation.rounds or number % config.evaluate.every == 0:
            with _clock(seconds, "evaluate"):
                if judge:
                    entry["heldout"] = judge(strategy, state)
                if config.evaluate.clients:
                    entry["client-test"] = evaluate_on_clients(
                        grid,
                        config,
                        fingerprint,
                        roster,
                        chosen,
                        number=number,
                        make_broadcast=lambda client, s=state, n=number: strategy.broadcast(s, client, n + 1),
                    )
        with _clock(seconds, "save"):
            record.save_adapter(strategy.global_adapter(state))
        seconds["round"] = time.perf_counter() - began
        entry["seconds"] = seconds
        record.round(entry)
        emit("round-end", entry=entry)
    return strategy.global_adapter(state)


def start(config: Config, clients: Sequence[ClientInfo]) -> AdapterState:
    """The seeded adapter of round 1, from the base model's shapes alone: at each module's largest rank, B = 0."""
    found = peft_io.shapes(config.model, config.lora)
    largest = {module: max(clients, key=lambda client: client.rank_of(module)) for module in found.lora}
    generator = torch.Generator().manual_seed(config.run.seed)
    factors = initial(
        found.lora,
        {module: client.rank_of(module) for module, client in largest.items()},
        {module: client.scaling_of(module) for module, client in largest.items()},
        generator,
    )
    return AdapterState(lora=factors.lora, dense=peft_io.initial_head(found.dense, generator))


def sample(client_ids: Sequence[int], fraction: float, seed: int, round: int) -> list[int]:
    """The clients of a round: at least one, drawn without replacement from (seed, round), in order of id."""
    count = max(1, min(len(client_ids), int(fraction * len(client_ids) + 0.5)))
    return sorted(random.Random(f"{seed}/{round}").sample(sorted(client_ids), count))


def _aggregate(
    strategy: Strategy, state: ServerState, this: TrainRound, chosen: Sequence[int], seconds: dict[str, float]
) -> ServerState:
    """The next state, or RunError when too few clients answered."""
    least = this.config.federation.min_clients
    began = time.perf_counter()
    arrived = this.updates(chosen)
    first = next(arrived, None)
    new = state if first is None else strategy.aggregate(state, _chain(first, arrived), this.number)
    if len(this.answers) < min(least, len(chosen)) or first is None:
        why = "; ".join(list(this.failures.values())[:3])
        raise RunError(
            f"round {this.number}: {len(this.answers)} of {len(chosen)} clients answered, and "
            f"federation.min-clients = {least}: {why}"
        )
    seconds["encode"], seconds["decode"] = this.encode_seconds, this.decode_seconds
    seconds["clients"] = this.wait_seconds
    seconds["aggregate"] = time.perf_counter() - began - sum(seconds.values())
    return new


def _chain(first: ClientUpdate, rest: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    yield first
    yield from rest


def aggregation_error(before: ServerState, after: ServerState, updates: Sequence[ClientUpdate]) -> float:
    """|what the round added - sum_k p_k dW_k| / |sum_k p_k dW_k| over all modules, in Frobenius norm.

    What the round added is its fold, if any, and the adapter that the next round starts from.
    """
    folds_from, folds = after.folds.since(before.folds.version)
    old = before.folds.total().lora if folds_from != before.folds.version else {}
    negated = {name: replace(factors, scaling=-factors.scaling) for name, factors in old.items()}
    added = concatenate((*folds, AdapterState(lora=after.adapter.lora), AdapterState(lora=negated)))
    return relative_error(added.lora, ideal(updates))


class Judge:
    """The global adapter on the held-out rows; callable, so that the rows are encoded once."""

    def __init__(self, config: Config, run_id: int) -> None:
        self._config, self._run_id = config, run_id
        self._bench = peft_io.workbench(config.model, config.lora)
        rows = prepare(config).heldout
        if not len(rows):
            raise RunError(
                "no held-out rows to evaluate on; raise data.heldout-fraction or set evaluate.server = false"
            )
        self._examples: list[Example] = encode(
            rows, self._bench.base.tokenizer, config.data, config.model.task, config.model.labels
        )

    def __call__(self, strategy: Strategy, state: ServerState) -> dict[str, float]:
        emit("evaluate-start", examples=len(self._examples))
        if self._config.anchor.base_update == "merge":  # this process's clients share the merged weights
            peft_io.merge_folds(self._bench, self._run_id, state.folds.parts)
            state = replace(state, folds=Folds())
        peft_io.install(self._bench, strategy.global_adapter(state))
        peft_io.install_anchor(self._bench, ())
        return evaluate(
            self._bench.model,
            self._examples,
            self._config.evaluate.batch_size,
            self._bench.base.pad_id,
            on_batch=lambda done, total: emit("evaluate-step", done=done, total=total),
        )


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
