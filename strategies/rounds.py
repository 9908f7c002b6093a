"""The round loop: sample, broadcast, collect, aggregate, evaluate, record. The same for every engine."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from flwr.serverapp import Grid
from torch.profiler import record_function

from fedlora import peft_io
from fedlora.adapter import AdapterState, initial
from fedlora.config import Config, clients_per_round
from fedlora.data import Example, encode, prepare
from fedlora.errors import RunError, StrategyError
from fedlora.evaluate import evaluate
from fedlora.events import emit
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.intruders import BaseSpectra
from fedlora.models import base_fingerprint, check_length, fresh_head
from fedlora.results import RunRecord

from . import checkpoint
from .base import ServerState, Strategy
from .collect import TrainRound, evaluate_on_clients, meet
from .diagnostics import Diagnosis, diagnose
from .folds import Folds
from .registry import configured

# A round's diagnosis needs every update at once; with more clients than this, memory and time matter more.
_MAX_DIAGNOSED = 32
_log = logging.getLogger("fedlora")


def run(grid: Grid, config: Config, record: RunRecord, run_id: int) -> None:
    """Run a whole federation.

    `record` keeps everything learned, as one adapter on the untouched base, and the numbers of every complete
    round, and so survives an interruption; a checkpoint of the server's state, after every round, lets the run go on
    from there. A strategy that asks for statistics gets them in a round 0, which
    differs in the clients' task alone: it is recorded like any round, and nothing is evaluated after it.

    Raises:
        RunError: fewer clients than `federation.min-clients` connected, or answered a round.
        StrategyError: the strategy cannot serve these clients, or nobody could evaluate what it learns.
    """
    strategy = configured(config)
    if strategy.personal and config.evaluate.server and not config.evaluate.clients:
        raise StrategyError(
            f"strategy.name = {config.strategy.name}: {' and '.join(sorted(strategy.personal))} stays on the clients, "
            "so that only they can evaluate what is learned; set evaluate.clients = true"
        )
    base = _base(config)
    fingerprint = base_fingerprint(config.model)
    saved = checkpoint.load(record.folder / "state", record.key)
    record.go_on(saved and saved[1])
    roster = meet(grid, config, fingerprint)
    clients = list(roster.infos.values())
    strategy.check(clients)
    record.start(clients, fingerprint, base.facts())
    first = 0 if strategy.statistics else 1
    state, done = saved or (checkpoint.plain(strategy.init(start(config, clients, base))), first - 1)
    judge = Judge(config, run_id) if config.evaluate.server and not strategy.personal else None
    if strategy.personal:
        _log.info(
            "no evaluation on held-out rows: %s has no model without a client's own factors", type(strategy).__name__
        )
    if judge:
        if not saved:
            record.baseline(judge(strategy, state, strategy.global_adapter(state)))
        emit("baseline", metrics=record.data["baseline"], head=base.words)
    if done == config.federation.rounds:  # died after its last round
        record.save_adapter(strategy.global_adapter(state))
    for number in range(done + 1, config.federation.rounds + 1):
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
            make_broadcast=lambda client, s=state, n=number: replace(strategy.broadcast(s, client, n), run=record.key),
            keep=len(chosen) <= _MAX_DIAGNOSED,
        )
        before, state = state, checkpoint.plain(_aggregate(strategy, state, this, chosen, seconds))
        learned = strategy.global_adapter(state)
        with _clock(seconds, "diagnose"):
            diagnosed = this.keep and number > 0 and not strategy.personal
            numbers = diagnose(before, state, this.kept, this.sent) if diagnosed else Diagnosis()
        entry: dict[str, object] = {
            "round": number,
            "train-loss": this.mean("train-loss"),
            "clients": dict(sorted(this.answers.items())),
            "failures": this.failures,
            "upload-bytes": this.upload_bytes,
            "download-bytes": this.download_bytes,
            "aggregation-error": numbers.error,
            "drift": numbers.drift,
            "update-cosine": numbers.update_cosine,
            "tail-energy": numbers.tail_energy,
            "effective-rank": numbers.effective_rank,
            "codec-error": this.mean("codec-error") if config.wire.upload_dtype != "fp32" else None,
            "norms": numbers.norms,
        }
        if number and (number == config.federation.rounds or number % config.evaluate.every == 0):
            with _clock(seconds, "evaluate"):
                if judge:
                    entry["heldout"] = judge(strategy, state, learned)
                    if judge.spectra:
                        entry["intruders"] = judge.spectra.counts()
                if config.evaluate.clients:
                    entry["client-test"] = evaluate_on_clients(
                        grid,
                        config,
                        fingerprint,
                        roster,
                        chosen,
                        number=number,
                        make_broadcast=lambda client, s=state, n=number: replace(
                            strategy.broadcast(s, client, n + 1), run=record.key
                        ),
                    )
        with _clock(seconds, "save"):
            record.save_adapter(learned)
        seconds["round"] = time.perf_counter() - began
        entry["seconds"] = seconds
        record.round(entry)
        with _clock(seconds, "checkpoint"):  # the last of a round: a round without it is played again
            checkpoint.save(record.folder / "state", state, number, record.key)
        emit("round-end", entry=entry)


def _base(config: Config) -> peft_io.Shapes:
    """The base's shapes, once it is seen that the run can be on it."""
    base = peft_io.shapes(config.model, config.lora)
    check_length(base.longest, config)
    return base


def start(config: Config, clients: Sequence[ClientInfo], base: peft_io.Shapes | None = None) -> AdapterState:
    """The seeded adapter of round 1, from the base model's shapes: at each module's largest rank, B = 0.

    A classifier's head is the base's own, or a seeded one; see `model.head`.
    """
    found = base or peft_io.shapes(config.model, config.lora)
    largest = {module: max(clients, key=lambda client: client.rank_of(module)) for module in found.lora}
    generator = torch.Generator().manual_seed(config.run.seed)
    factors = initial(
        found.lora,
        {module: client.rank_of(module) for module, client in largest.items()},
        {module: client.scaling_of(module) for module, client in largest.items()},
        generator,
    )
    return AdapterState(lora=factors.lora, dense=dict(found.head) or fresh_head(found.dense, generator))


def sample(client_ids: Sequence[int], fraction: float, seed: int, round: int) -> list[int]:
    """The clients of a round: at least one, drawn without replacement from (seed, round), in order of id."""
    count = clients_per_round(len(client_ids), fraction)
    return sorted(random.Random(f"{seed}/{round}").sample(sorted(client_ids), count))


def _aggregate(
    strategy: Strategy, state: ServerState, this: TrainRound, chosen: Sequence[int], seconds: dict[str, float]
) -> ServerState:
    """The next state, or RunError when too few clients answered."""
    least = this.config.federation.min_clients
    began = time.perf_counter()
    arrived = this.updates(chosen)
    first = next(arrived, None)
    with record_function("fedlora/aggregation"):
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


class Judge:
    """The global adapter on the held-out rows; callable, so that the rows are encoded once."""

    def __init__(self, config: Config, run_id: int) -> None:
        self._config, self._run_id = config, run_id
        self._bench = peft_io.workbench(config.model, config.lora)
        self.spectra = BaseSpectra(self._bench) if config.evaluate.intruders else None
        rows = prepare(config).heldout
        if not len(rows):
            raise RunError(
                "no held-out rows to evaluate on; raise data.heldout-fraction or set evaluate.server = false"
            )
        self._examples: list[Example] = encode(
            rows, self._bench.base.tokenizer, config.data, config.model.task, config.model.labels
        )

    def __call__(self, strategy: Strategy, state: ServerState, learned: AdapterState) -> dict[str, float]:
        """Metrics of what is learned: the strategy's global adapter at this state."""
        emit("evaluate-start", examples=len(self._examples))
        if self._config.anchor.base_update == "merge":  # this process's clients share the merged weights
            peft_io.merge_folds(self._bench, self._run_id, state.folds.parts)
            learned = strategy.global_adapter(replace(state, folds=Folds()))
        peft_io.install(self._bench, learned)
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
    with record_function(f"fedlora/{name}"):
        yield
    seconds[name] = time.perf_counter() - began
