"""Flower's ClientApp: describes the client, trains, evaluates. Every message says all that it needs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora import config as configuration
from fedlora import peft_io, wire
from fedlora.config import Config
from fedlora.data import LazyExamples, client_split, prepare
from fedlora.errors import ConfigError, DataError, FedLoraError
from fedlora.evaluate import evaluate as evaluate_model
from fedlora.events import emit
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.models import base_fingerprint
from fedlora.results import peak_memory_bytes

from . import trainer
from .held_folds import StaleBase, bring_up

Handler = Callable[[Message, Context], RecordDict]

app = ClientApp()


def _answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """A refusal is an answer too: one sentence for the server to show, never a dead process."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return Message(handler(message, context), reply_to=message)
        except StaleBase as error:
            return Message(Error(wire.STALE, str(error)), reply_to=message)
        except FedLoraError as error:
            return Message(Error(wire.REFUSED, str(error)), reply_to=message)

    return handle


@app.query()
@_answer
def describe(message: Message, context: Context) -> RecordDict:
    """Rank, alpha and number of training examples of this client."""
    config = _config(context)
    fingerprint = base_fingerprint(config.model)
    wire.check_hello(message.content, fingerprint)
    return wire.encode_info(_info(config, context), fingerprint)


@app.train()
@_answer
def train(message: Message, context: Context) -> RecordDict:
    """One round of local training from the server's start."""
    began = time.perf_counter()
    config, client_id, bench, broadcast = _open(message, context)
    info = _info(config, context)
    _check_ranks(broadcast, info)
    parameters = _set_up(bench, config, context, broadcast, broadcast.trainable)
    examples = _examples(config, client_id, _own_data(context))[0]
    emit("client-start", client_id=client_id, rank=info.rank, round=broadcast.round)
    result = trainer.train(
        bench.model,
        parameters,
        examples,
        config.train,
        pad_id=bench.base.pad_id,
        round=broadcast.round,
        rounds=config.federation.rounds,
        seed=trainer.hash_seed(config.run.seed, client_id),
        on_step=lambda step, steps, loss: emit(
            "client-step", client_id=client_id, step=step, steps=steps, loss=loss, round=broadcast.round
        ),
    )
    adapter = peft_io.read(bench)
    update = ClientUpdate(
        client_id=client_id,
        adapter=adapter,
        num_examples=len(examples),
        base_version=broadcast.base_version,
        metrics={
            "train-loss": result.loss,
            "train-last-loss": result.last_loss,
            "train-steps": result.steps,
            "train-tokens": result.tokens,
            "train-seconds": result.seconds,
            "client-seconds": time.perf_counter() - began,
            "peak-memory-bytes": peak_memory_bytes()["process"],
        },
    )
    # A process that lives from message to message still holds these folds next time.
    known = broadcast.base_version if context.node_config.get("resident") else 0
    return wire.encode_update(update, bench.base.fingerprint, config.wire.dtype, broadcast.upload, known)


@app.evaluate()
@_answer
def evaluate(message: Message, context: Context) -> RecordDict:
    """The server's adapter on this client's own test rows."""
    config, client_id, bench, broadcast = _open(message, context)
    _set_up(bench, config, context, broadcast, frozenset())
    examples = _examples(config, client_id, _own_data(context))[1]
    if not examples:
        raise DataError(
            f"client {client_id} has no test rows; raise data.client-test-fraction or set evaluate.clients = false"
        )
    metrics = evaluate_model(bench.model, examples, config.evaluate.batch_size, bench.base.pad_id)
    return wire.encode_evaluation(len(examples), metrics, bench.base.fingerprint)


def _open(message: Message, context: Context) -> tuple[Config, int, peft_io.Workbench, Broadcast]:
    """What every message on the adapter begins with: the config, who this is, the base, and what was sent."""
    config = _config(context)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    bench = peft_io.workbench(config.model, config.lora)
    return config, _client_id(context), bench, wire.decode_broadcast(message.content, bench.base.fingerprint)


def _set_up(
    bench: peft_io.Workbench, config: Config, context: Context, broadcast: Broadcast, trainable: frozenset[str]
) -> list[torch.nn.Parameter]:
    """The base at the broadcast's version, and its adapter in place."""
    folds = bring_up(context.run_id, broadcast)
    if config.anchor.base_update == "merge":
        peft_io.merge_folds(bench, context.run_id, folds)
        folds = ()
    parameters = peft_io.install(bench, broadcast.adapter, trainable)
    peft_io.install_anchor(bench, folds)
    return parameters


def _check_ranks(broadcast: Broadcast, info: ClientInfo) -> None:
    """A server may not ask for more than this client's hardware affords."""
    for module, factors in broadcast.adapter.lora.items():
        if factors.rank > info.rank_of(module):
            raise ConfigError(
                f"{module}: the server sent rank {factors.rank}, client {info.client_id} affords {info.rank_of(module)}"
            )


def _config(context: Context) -> Config:
    return configuration.parse(context.run_config, where="run config")


def _client_id(context: Context) -> int:
    return int(context.node_config.get("partition-id", context.node_id))


def _own_data(context: Context) -> str:
    """The node's own data file, where its config names one."""
    return str(context.node_config.get("data", ""))


def _info(config: Config, context: Context) -> ClientInfo:
    client_id = _client_id(context)
    rank = context.node_config.get("rank") or configuration.client_rank(config.lora, client_id)
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"node config: rank = {rank!r}, expected a positive integer")
    train_rows, _ = _rows(config, client_id, _own_data(context))
    return ClientInfo(
        client_id=client_id,
        rank=rank,
        alpha=config.lora.alpha,
        num_examples=len(train_rows),
        rslora=config.lora.rslora,
        rank_pattern=configuration.rank_pattern(config.lora),
    )


@functools.lru_cache(maxsize=4096)
def _rows(config: Config, client_id: int, own_data: str):
    """This client's rows, split into training and test rows."""
    if own_data:
        if not Path(own_data).is_file():
            raise DataError(f"node config: data = {own_data!r}: no such file")
        alone = replace(config.data, source=own_data, partition="iid", heldout_fraction=0.0)
        config = replace(config, data=alone, federation=replace(config.federation, clients=1))
        rows = prepare(config).client(0)
    else:
        rows = prepare(config).client(client_id)
    fraction = config.data.client_test_fraction if config.evaluate.clients else 0.0
    return client_split(rows, fraction, trainer.hash_seed(config.run.seed, client_id))


@functools.lru_cache(maxsize=64)
def _examples(config: Config, client_id: int, own_data: str) -> tuple[LazyExamples, LazyExamples]:
    """This client's training and test examples."""
    tokenizer = peft_io.workbench(config.model, config.lora).base.tokenizer
    train_rows, test_rows = _rows(config, client_id, own_data)
    return LazyExamples(train_rows, tokenizer, config), LazyExamples(test_rows, tokenizer, config)
