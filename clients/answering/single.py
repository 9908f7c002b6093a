"""What a client does for each of a server's messages: describe itself, train, evaluate.

Every message says all that it needs; the answer is a record, or an error whose reason is for the server to show.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, Error, RecordDict
from flwr.common.constant import ErrorCode

from fedlora import config as configuration
from fedlora.adapters import AdapterState, keep_factors, not_finite
from fedlora.common.assets import cache_dir
from fedlora.common.errors import ConfigError, DataError, DivergedError, FedLoraError
from fedlora.common.events import emit
from fedlora.config import Config, Scalar
from fedlora.data import LazyExamples, class_names, client_split, form_of, kept_back, prepare
from fedlora.data.checked import warn_of_lengths
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, wire
from fedlora.models import adapted, base_fingerprint, pick_device
from fedlora.results.record import peak_memory_bytes
from fedlora.tasks.predict import evaluate as evaluate_model

from ..node import memory, own_rows, own_state, rules
from ..node.held_folds import StaleBase, bring_up
from ..statistics.gradients import leading_directions
from ..training import trainer
from .uploads import coded

_log = logging.getLogger("fedlora")


def answer(task: str, content: RecordDict, context: Context) -> RecordDict | Error:
    """Do what a message asks for; on a node that hosts several clients, for each of them.

    What goes wrong with a node's own rows may quote them, and stays in the node's log.

    Args:
        task: "describe", "train" or "evaluate".
        content: the message's.
        context: of this run on this node.

    Returns:
        The reply's content; or an error: a refusal is an answer too, never a dead process.
    """
    try:
        if rules.hosted(context.node_config):
            from . import hosted  # which imports this module

            return hosted.answer(task, content, context)
        return _TASKS[task](content, context)
    except Exception as error:
        return refusal(error, context.node_config)


def refusal(error: Exception, settings: Mapping[str, Scalar]) -> Error:
    """What the server is told."""
    code, reason = wire.REFUSED, str(error)
    if isinstance(error, StaleBase):
        code = wire.STALE
    elif isinstance(error, DataError) and rules.own_data(settings):
        _log.error("%s", error)
        reason = "node config: the file that data names cannot be used; the node's log says why"
    elif memory.ran_out(error):
        reason = memory.refusal(settings)
    elif isinstance(error, DivergedError):
        code = wire.DIVERGED
    elif not isinstance(error, FedLoraError):
        _log.error("a message was not answered", exc_info=error)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        own = f"{type(error).__name__} on a node with its own data; the node's log says more"
        reason = own if rules.own_data(settings) else "".join(traceback.format_exception(error))
    return Error(code, reason)


def describe(content: RecordDict, context: Context) -> RecordDict:
    """Rank, alpha and number of training examples of this client."""
    config = config_of(context)
    own_rows.look(context.node_config)
    fingerprint = base_fingerprint(config.model)
    wire.check_hello(content, fingerprint)
    return wire.encode_info(_info(config, context), fingerprint)


@dataclass(frozen=True)
class Work:
    """One training message, read and checked.

    Attributes:
        examples: the client's training examples.
        began: when, by `time.perf_counter`.
    """

    config: Config
    client_id: int
    bench: adapted.Workbench
    broadcast: Broadcast
    context: Context
    examples: LazyExamples
    began: float

    @property
    def seed(self) -> int:
        return trainer.hash_seed(self.config.run.seed, self.client_id)

    def start(self) -> AdapterState:
        """What its training starts from: the broadcast's adapter, with this client's own factors."""
        return own_state.with_own(self.broadcast, _own_folder(self.context, self.broadcast))

    def tell(self, step: int, steps: int, loss: float) -> None:
        """One step's progress."""
        emit("client-step", client_id=self.client_id, step=step, steps=steps, loss=loss, round=self.broadcast.round)


def train(content: RecordDict, context: Context) -> RecordDict:
    """One round's task from the server's start: local training, or the gradient's leading directions."""
    return train_alone(begin(content, context))


def begin(content: RecordDict, context: Context) -> Work:
    """Read and check one training message.

    Raises:
        FedLoraError: this client cannot do what it is asked.
    """
    began = time.perf_counter()
    config, client_id, bench, broadcast = _open(content, context)
    info = _info(config, context)
    _check_ranks(broadcast, info, context)
    own_rows.look(context.node_config)
    examples = training_examples(config, context)
    seed = trainer.hash_seed(config.run.seed, client_id)
    if broadcast.task == "train":  # a row that cannot be one fails its client alone, before others share its batches
        for place in trainer.examples_of(config.train, len(examples), broadcast.round, seed):
            examples[place]
    emit("client-start", client_id=client_id, rank=info.rank, round=broadcast.round)
    return Work(config, client_id, bench, broadcast, context, examples, began)


def train_alone(work: Work) -> RecordDict:
    """Train one client by itself; the reply."""
    config, broadcast, bench = work.config, work.broadcast, work.bench
    parameters = _set_up(work, broadcast.trainable)
    if broadcast.task == "gradient":
        adapter, result = _gradient(bench, config, work.client_id, broadcast, work.examples)
    else:
        result = trainer.train(
            bench.model,
            parameters,
            work.examples,
            config.train,
            pad_id=bench.base.pad_id,
            round=broadcast.round,
            rounds=config.federation.rounds,
            seed=work.seed,
            on_step=work.tell,
            penalty=_penalty(bench, config),
        )
        adapter = adapted.read(bench)
    return finish(work, adapter, result)


def finish(work: Work, adapter: AdapterState, result: trainer.TrainResult) -> RecordDict:
    """Keep what is the client's own, and make the reply of a trained adapter."""
    config, context, broadcast, client_id = work.config, work.context, work.broadcast, work.client_id
    emit("client-trained", client_id=client_id, round=broadcast.round, loss=result.loss, seconds=result.seconds)
    _check_finite(adapter, broadcast.round)
    folder = _own_folder(context, broadcast)
    if broadcast.personal:
        personal = _personal_part(adapter, broadcast.personal)
        own_state.save(folder, "personal", personal, broadcast.round, keep=config.run.keep + 1)
    to_send, codec_error = coded(adapter, broadcast, config.wire.upload_dtype, folder, keep=config.run.keep + 1)
    update = ClientUpdate(
        client_id=client_id,
        adapter=to_send,
        num_examples=len(work.examples),
        base_version=broadcast.base_version,
        metrics={
            "train-loss": result.loss,
            "train-last-loss": result.last_loss,
            "train-steps": result.steps,
            "train-tokens": result.tokens,
            "train-seconds": result.seconds,
            "codec-error": codec_error,
            "client-seconds": time.perf_counter() - work.began,
            "peak-memory-bytes": peak_memory_bytes()["process"],
            "train-cut": work.examples.cut,
        },
    )
    # A process that lives from message to message still holds these folds next time.
    known = broadcast.base_version if context.node_config.get("resident") else 0
    return wire.encode_update(
        update,
        work.bench.base.fingerprint,
        config.wire.upload_dtype,
        broadcast.upload,
        known,
        round=broadcast.round,
        task=broadcast.task,
    )


def pruning(config: Config) -> tuple[float, float] | None:
    """HetLoRA's gamma and weight of the term that shrinks what it may prune, where it is asked for."""
    gamma, weight = config.lora.prune_gamma, config.lora.prune_weight
    return (gamma, weight) if gamma and weight and config.strategy.name == "hetlora" else None


def _penalty(bench: adapted.Workbench, config: Config) -> Callable[[], None]:
    prune = pruning(config)
    return functools.partial(trainer.add_tail_penalty, adapted.factors_of(bench), *prune) if prune else lambda: None


def _gradient(
    bench: adapted.Workbench, config: Config, client_id: int, broadcast: Broadcast, examples: LazyExamples
) -> tuple[AdapterState, trainer.TrainResult]:
    """The gradient's leading directions, as many for each module as its factors in the broadcast have rows."""
    lora, result = leading_directions(
        bench.model,
        bench.layers,
        {name: factors.rank for name, factors in broadcast.adapter.lora.items()},
        examples,
        config.train,
        pad_id=bench.base.pad_id,
        seed=trainer.hash_seed(config.run.seed, client_id),
    )
    return AdapterState(lora=lora, tensors=broadcast.adapter.tensors), result


def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """The server's adapter on this client's own test rows."""
    began = time.perf_counter()
    config, client_id, bench, broadcast = _open(content, context)
    examples = _examples(config, client_id, rules.own_data(context.node_config))[1]
    _set_up(Work(config, client_id, bench, broadcast, context, examples, began), frozenset())
    if not examples:
        raise ConfigError(
            f"client {client_id} has no test rows; raise data.client-test-fraction or set evaluate.clients = false"
        )

    def tell(done: int, total: int) -> None:
        emit("client-evaluate-step", client_id=client_id, done=done, total=total, round=broadcast.round)

    metrics = evaluate_model(bench.model, examples, config.evaluate.batch_size, bench.base.pad_id, tell)
    emit("client-evaluated", client_id=client_id, round=broadcast.round, **metrics)
    return wire.encode_evaluation(len(examples), metrics, bench.base.fingerprint)


_TASKS = {"describe": describe, "train": train, "evaluate": evaluate}


def _open(content: RecordDict, context: Context) -> tuple[Config, int, adapted.Workbench, Broadcast]:
    """What every message on the adapter begins with: the config, who this is, the base, and what was sent."""
    config = config_of(context)
    if config.run.threads:
        torch.set_num_threads(min(config.run.threads, os.cpu_count() or 1))
    memory.limit(context.node_config, pick_device(config.model.device))
    bench = adapted.workbench(config.model, config.lora)
    return config, _client_id(context), bench, wire.decode_broadcast(content, bench.base.fingerprint)


def _set_up(work: Work, trainable: frozenset[str]) -> list[torch.nn.Parameter]:
    """The base at the broadcast's version, and its adapter in place, with this client's own factors."""
    folds = folds_beside(work)
    parameters = adapted.install(work.bench, work.start(), trainable)
    adapted.install_anchor(work.bench, folds)
    return parameters


def folds_beside(work: Work) -> tuple[AdapterState, ...]:
    """The folds that are to be installed as the anchor: none where they are merged into the base, here."""
    folds = bring_up(work.context.run_id, work.broadcast)
    if work.config.anchor.base_update == "merge":
        adapted.merge_folds(work.bench, work.context.run_id, folds)
        return ()
    return folds


def _personal_part(adapter: AdapterState, personal: frozenset[str]) -> AdapterState:
    return AdapterState(lora=keep_factors(adapter, personal).lora)


def _check_finite(adapter: AdapterState, round: int) -> None:
    """Raises DivergedError where a value is not finite: it would spoil every later round, here and elsewhere."""
    name = not_finite(adapter)
    if name:
        raise DivergedError(f"training diverged: {name} is not finite at the end of round {round}; lower train.lr")


def _own_folder(context: Context, broadcast: Broadcast) -> Path:
    """Where this client keeps its own state in this run: below the node's `state` folder, or the cache."""
    root = context.node_config.get("state") or cache_dir() / "clients"
    return own_state.folder_of(str(root), broadcast.run or str(context.run_id), _client_id(context))


def _check_ranks(broadcast: Broadcast, info: ClientInfo, context: Context) -> None:
    """A server may not ask for more than this client's hardware affords."""
    for module, factors in broadcast.adapter.lora.items():
        if factors.rank > info.rank_of(module):
            key = next((key for key in ("max-rank", "rank") if key in context.node_config), "")
            raise ConfigError(
                f"{module}: the server sent rank {factors.rank}, client {info.client_id} affords "
                f"{info.rank_of(module)}{f' (node config: {key})' if key else ''}"
            )


def config_of(context: Context) -> Config:
    """The run's config as this node takes part in it."""
    items = tuple((key, type(value), value) for key, value in context.run_config.items())
    return rules.ruled(_parsed(items), context.node_config)


@functools.lru_cache(maxsize=4)
def _parsed(items: tuple[tuple[str, type, Scalar], ...]) -> Config:
    """A run config, which every message carries and which takes milliseconds to check.

    Args:
        items: key, type and value; the type, since 1 equals true.
    """
    return configuration.parse({key: value for key, _, value in items}, where="run config")


def _client_id(context: Context) -> int:
    return int(context.node_config.get("partition-id", context.node_id))


def _info(config: Config, context: Context) -> ClientInfo:
    client_id = _client_id(context)
    rank = rules.rank(config, context.node_config, client_id)
    form_of(prepare(config).rows.column_names, config.data, config.model.task)  # a column that is missing is said first
    rows = _train_rows(config, client_id, rules.own_data(context.node_config))
    rules.check_steps(config.train, context.node_config, trainer.steps_per_round(config.train, rows))
    return ClientInfo(
        client_id=client_id,
        rank=rank,
        alpha=config.lora.alpha,
        num_examples=rows,
        rslora=config.lora.rslora,
        rank_pattern=configuration.rank_pattern(config.lora),
        class_names=_class_names(config),
    )


def _class_names(config: Config) -> tuple[str, ...]:
    if config.model.task != "classification":
        return ()
    return class_names(prepare(config).rows, config.data, config.model.labels)


def training_examples(config: Config, context: Context) -> LazyExamples:
    """This client's training examples, encoded as they are asked for.

    Raises:
        DataError: none of its rows has anything to predict.
    """
    examples = _examples(config, _client_id(context), rules.own_data(context.node_config))[0]
    if not examples:
        raise DataError(examples.left_out)
    return examples


def _train_rows(config: Config, client_id: int, own_data: str) -> int:
    """How many training rows this client has; none is read, since most of many clients are never sampled."""
    rows = prepare(config).count(0 if own_data else client_id)
    return rows - kept_back(rows, _test_fraction(config))


def _test_fraction(config: Config) -> float:
    return config.data.client_test_fraction if config.evaluate.clients else 0.0


@functools.lru_cache(maxsize=64)
def _examples(config: Config, client_id: int, own_data: str) -> tuple[LazyExamples, LazyExamples]:
    """This client's training and test examples."""
    tokenizer = adapted.workbench(config.model, config.lora).base.tokenizer
    rows = prepare(config).client(0 if own_data else client_id)
    seed = trainer.hash_seed(config.run.seed, client_id)
    found = [LazyExamples(part, tokenizer, config) for part in client_split(rows, _test_fraction(config), seed)]
    if own_data:  # which nobody but this node has seen
        warn_of_lengths(rows, tokenizer, config)
    for examples in found:
        if examples and examples.left_out:
            _log.warning("client %d: %s", client_id, examples.left_out)
    return found[0], found[1]
