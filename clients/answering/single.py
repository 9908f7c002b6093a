"""What a client does for each of a server's messages: describe itself, train, project what it trained, evaluate.

Every message says all that it needs; the answer is a record, or an error whose reason is for the server to show.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import Context, Error, RecordDict

from fedlora import config as configuration
from fedlora.adapters import AdapterState, count_numbers, keep_factors, not_finite
from fedlora.adapters.kinds.base import settled
from fedlora.common.errors import ConfigError, DivergedError
from fedlora.common.events import emit
from fedlora.config import Config, ModelConfig, steps_per_round
from fedlora.data import LazyExamples, form_of, prepare
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan, sketches, wire
from fedlora.exchange.privacy import starts_with_noise
from fedlora.exchange.stages import stages
from fedlora.models import adapted, base_fingerprint, pick_device
from fedlora.models.injection import shape_of
from fedlora.models.parts import check_probe
from fedlora.models.per_example import check_rows, row_gradients
from fedlora.models.trainable import Trainable
from fedlora.results.environment import peak_memory_bytes
from fedlora.tasks.checked import check_batch
from fedlora.tasks.predict import evaluate as evaluate_model
from fedlora.tasks.registry import check_task

from ..node import memory, own_rows, own_state, rules, spent
from ..node.held_folds import folds_up_to
from ..node.rules import client_id_of, config_of
from ..statistics.registry import STATISTICS
from ..training import projections, schedule, terms, trainer
from ..training.private import RowPrivacy
from . import secure
from .refusals import refusal
from .rows import train_and_test, train_rows, training_examples
from .uploads import encode_upload

_TRAINED = "trained"  # what a round trained, among the client's own state


def answer(task: str, content: RecordDict, context: Context) -> RecordDict | Error:
    """Do what a message asks of one client.

    Args:
        task: "describe", "keys", "shares", "train", "project", "open" or "evaluate".
        content: the message's.
        context: of this run and client.

    Returns:
        The reply's content; or an error: a refusal is an answer too, never a dead process.
    """
    try:
        return _TASKS[task](content, context)
    except Exception as error:
        return refusal(error, context.node_config)


def describe(
    content: RecordDict, context: Context, fingerprint_of: Callable[[ModelConfig], str] = base_fingerprint
) -> RecordDict:
    """Rank, alpha and number of training examples of this client.

    Args:
        content: the message's.
        context: of this run and client.
        fingerprint_of: the fingerprint of a base model.
    """
    config = config_of(context)
    own_rows.look(context.node_config)
    fingerprint = fingerprint_of(config.model)
    wire.check_hello(content, fingerprint)
    return wire.encode_info(_info(config, context), fingerprint)


@dataclass(frozen=True)
class TrainingJob:
    """One training message, read and checked.

    Attributes:
        examples: the client's training examples.
        began: when, by `time.perf_counter`.
    """

    config: Config
    client_id: int
    model: adapted.AdaptedModel
    broadcast: Broadcast
    context: Context
    examples: LazyExamples
    began: float

    @property
    def seed(self) -> int:
        return schedule.hash_seed(self.config.run.seed, self.client_id)

    def start(self) -> AdapterState:
        """What its training starts from: the broadcast's adapter, with this client's own factors."""
        own = own_state.with_personal_factors(self.broadcast, own_state.own_folder(self.context, self.broadcast.run))
        return adapted.filled(self.model, own)

    @cached_property
    def privacy(self) -> RowPrivacy | None:
        """What protects this client's rows, with random numbers of its own."""
        return RowPrivacy.of(self.config, len(self.examples))

    @cached_property
    def kept(self) -> AdapterState | None:
        """The g of a term of the plan, by what this client kept of earlier rounds; see `terms.kept_before`."""
        sent = self.broadcast
        if not (name := terms.keeps(sent.plan)):
            return None
        # c has only what the server counted, and not the reply of a round that was lost
        before = sent.counted + 1 if name == terms.CONTROL else sent.round
        own = own_state.load(own_state.own_folder(self.context, sent.run), name, before)
        return terms.kept_before(own, sent.control, sent.plan)

    def tell(self, step: int, steps: int, loss: float) -> None:
        """One step's progress."""
        emit("client-step", client_id=self.client_id, step=step, steps=steps, loss=loss, round=self.broadcast.round)


def train(content: RecordDict, context: Context) -> RecordDict:
    """One round's task from the server's start: local training, or the gradient's leading directions."""
    return train_alone(begin(content, context))


def begin(content: RecordDict, context: Context) -> TrainingJob:
    """Read and check one training message.

    Raises:
        FedLoraError: this client cannot do what it is asked.
    """
    began = time.perf_counter()
    config, client_id, model, broadcast = _open(content, context)
    info = _info(config, context)
    _check_ranks(model, broadcast, info, context)
    terms.check_terms(broadcast.plan)
    if config.privacy.secure_sum and not broadcast.masking:
        raise ConfigError(
            f"client {client_id}: the server asks for this client's own numbers, and privacy.secure-sum promises that "
            "it sees only sums"
        )
    own_rows.look(context.node_config)
    examples = training_examples(config, context)
    seed = schedule.hash_seed(config.run.seed, client_id)
    if broadcast.job == "train":  # a row that cannot be one fails its client alone, before others share its batches
        private = config.privacy.level == "example"  # its steps draw among all of them
        asked = (
            [*range(len(examples))]
            if private
            else schedule.examples_of(config.train, len(examples), broadcast.round, seed)
        )
        examples.ahead(asked)
        first = [examples[place] for place in asked[:1]]
        check_batch(model.task, model.task.collate(first, model.base.pad_id), 1)
    if config.privacy.level == "example":
        check_rows(model)
    if broadcast.job == "train" or starts_with_noise(config):  # whose round 0 costs as much as another round
        spent.charge(config, context, broadcast.run, len(examples))
    emit("client-start", client_id=client_id, rank=info.rank, round=broadcast.round)
    return TrainingJob(config, client_id, model, broadcast, context, examples, began)


def train_alone(work: TrainingJob) -> RecordDict:
    """Train one client by itself; the reply."""
    config, broadcast, model = work.config, work.broadcast, work.model
    if broadcast.job != "train":
        noised = starts_with_noise(config)
        if config.privacy.level != "none" and not noised:
            raise ConfigError(
                f"privacy.level = {config.privacy.level}: the server asks for a statistic of this client's rows, "
                f"{broadcast.job}, which has no noise; set lora.init = uniform and lora.allocation = pattern"
            )
        rules.check_plugins(config, work.context.node_config, broadcast.job)
        statistic = STATISTICS.load(broadcast.job)
        adapted.install(model, adapted.untouched(model, broadcast.adapter.tensors), folds=folds_beside(work))
        if noised:
            assert work.privacy is not None
            adapter, result = statistic.measure_with_noise(
                model,
                broadcast.adapter,
                work.examples,
                config.train,
                privacy=work.privacy,
                releases=steps_per_round(config.train, len(work.examples)),
            )
        else:
            adapter, result = statistic.measure(model, broadcast.adapter, work.examples, config.train, work.seed)
    else:
        trained = _set_up(work, broadcast.plan)
        with row_gradients(model) if work.privacy else nullcontext() as rows:
            result = trainer.train(
                model.task,
                model.model,
                trained,
                work.examples,
                config.train,
                pad_id=model.base.pad_id,
                number=broadcast.round,
                rounds=config.federation.rounds,
                seed=work.seed,
                plan=broadcast.plan,
                on_step=work.tell,
                penalty=terms.penalty(trained.pairs, broadcast.plan, work.kept),
                project=projections.projection(model, trained.pairs, broadcast.plan),
                stages=stages(config.privacy),
                privacy=work.privacy,
                rows=rows,
                heads=[*model.tensors],
            )
        adapter = adapted.read(model)
    return finish(work, adapter, result)


def finish(work: TrainingJob, adapter: AdapterState, result: trainer.TrainResult) -> RecordDict:
    """Keep what is the client's own, and make the reply of a trained adapter."""
    config, context, broadcast, client_id = work.config, work.context, work.broadcast, work.client_id
    emit("client-trained", client_id=client_id, round=broadcast.round, loss=result.loss, seconds=result.seconds)
    _check_finite(adapter, broadcast.round)
    if broadcast.job == "train":
        adapter = settled(adapter, work.model.kind, work.model.layers)
    folder = own_state.own_folder(context, broadcast.run)
    if broadcast.plan.keep:
        personal = _personal_part(adapter, broadcast.plan)
        own_state.save(folder, "personal", personal, broadcast.round, keep=config.run.keep + 1)
    kept = terms.kept_after(work.kept, broadcast.adapter, adapter, broadcast.plan, result.rate)
    if kept is not None:
        name, keep = terms.keeps(broadcast.plan), config.run.keep + 1
        own_state.save(folder, name, kept, broadcast.round, keep=keep, since=broadcast.counted)
    for stage in stages(config.privacy):
        adapter = stage.leaving(adapter, broadcast, schedule.hash_seed(work.seed, broadcast.round))
    # A statistic is sent once, and has sums beside each other that would drown in one scale.
    number_format = config.wire.upload_dtype if broadcast.job == "train" else "fp32"
    density, keep = config.wire.upload_density, config.run.keep + 1
    if sketch := broadcast.plan.sketch:
        if sketch.passes == 2:
            own_state.save(folder, _TRAINED, adapter, broadcast.round, keep=1)
        to_send, codec_error, number_format = sketches.made(broadcast.plan, adapter), 0.0, "fp32"
    else:
        to_send, codec_error = encode_upload(adapter, broadcast, number_format, folder, density=density, keep=keep)
    update = ClientUpdate(
        client_id=client_id,
        adapter=to_send,
        num_examples=len(work.examples),
        base_version=broadcast.base_version,
        metrics=_told(
            {
                "train-loss": result.loss,
                "train-last-loss": result.last_loss,
                "train-steps": result.steps,
                "train-tokens": result.tokens,
                "train-seconds": result.seconds,
                "codec-error": codec_error,
                "client-seconds": time.perf_counter() - work.began,
                "peak-memory-bytes": peak_memory_bytes()["process"],
                "train-cut": work.examples.cut,
                "train-rate": result.rate,
            },
            config,
        ),
    )
    # A process that lives from message to message still holds these folds next time.
    known = broadcast.base_version if context.node_config.get("resident") else 0
    if broadcast.masking:
        return secure.masked(update, broadcast, folder, work.model.base.fingerprint, known)
    return wire.encode_update(
        update,
        work.model.base.fingerprint,
        number_format,
        broadcast.plan.send,
        known,
        number=broadcast.round,
        job=broadcast.job,
    )


def project(content: RecordDict, context: Context) -> RecordDict:
    """What this client trained in the round that goes on, on the server's bases.

    It lies in the client's own state, so that the answer is the same whenever it is asked for, and needs no model.

    Raises:
        ConfigError: this client has trained nothing in that round, or the run has secure sums.
        WireError: the message is malformed, or its bases do not fit what was trained.
    """
    config, client_id = config_of(context), client_id_of(context)
    if config.privacy.secure_sum:
        raise ConfigError(
            f"client {client_id}: the server asks a second question about what this client trained, and "
            "privacy.secure-sum promises that it sees only one sum; set wire.sketch-passes = 1"
        )
    fingerprint = base_fingerprint(config.model)
    question = wire.decode_second(content, fingerprint)
    folder = own_state.own_folder(context, question.run)
    trained = own_state.load_of(folder, _TRAINED, question.round)
    if trained is None:
        raise ConfigError(
            f"client {client_id} has kept no adapter of round {question.round}; it answers the second question of a "
            "round only after the first"
        )
    bases = sketches.bases(question, trained)
    answer = sketches.made(question.plan, trained, second=True, bases=bases)
    return wire.encode_answer(client_id, question.round, answer, fingerprint)


def _told(metrics: dict[str, float], config: Config) -> dict[str, float]:
    """The metrics that are sent: with privacy of rows, none that the mechanism does not cover."""
    return {n: value for n, value in metrics.items() if config.privacy.level != "example" or n not in wire.OF_ROWS}


def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """The server's adapter on this client's own test rows."""
    began = time.perf_counter()
    config, client_id, model, broadcast = _open(content, context)
    examples = train_and_test(config, client_id, rules.own_data(context.node_config))[1]
    _set_up(TrainingJob(config, client_id, model, broadcast, context, examples, began), Plan(train=frozenset()))
    if not examples:
        raise ConfigError(
            f"client {client_id} has no test rows; raise data.client-test-fraction or set evaluate.clients = false"
        )

    def tell(done: int, total: int) -> None:
        emit("client-evaluate-step", client_id=client_id, done=done, total=total, round=broadcast.round)

    size, pad_id = config.evaluate.batch_size, model.base.pad_id
    metrics = evaluate_model(model.task, model.model, examples, size, pad_id, on_batch=tell)
    emit("client-evaluated", client_id=client_id, round=broadcast.round, **metrics)
    return wire.encode_evaluation(len(examples), metrics, model.base.fingerprint, model.task.metrics)


_TASKS = {
    "describe": describe,
    "keys": secure.keys,
    "shares": secure.shares,
    "train": train,
    "project": project,
    "open": secure.opened,
    "evaluate": evaluate,
}


def _open(content: RecordDict, context: Context) -> tuple[Config, int, adapted.AdaptedModel, Broadcast]:
    """What every message on the adapter begins with: the config, who this is, the base, and what was sent."""
    config = config_of(context)
    if config.run.threads:
        torch.set_num_threads(min(config.run.threads, os.cpu_count() or 1))
    memory.limit(context.node_config, pick_device(config.model.device))
    model = adapted.adapted_model(config.model, config.lora)
    broadcast = wire.decode_broadcast(content, model.base.fingerprint)
    check_probe(model, broadcast.adapter, broadcast.probe)
    return config, client_id_of(context), model, broadcast


def _set_up(work: TrainingJob, plan: Plan) -> Trainable:
    """The base at the broadcast's version, and its adapter in place, with this client's own factors."""
    folds = folds_beside(work)
    return adapted.install(work.model, work.start(), plan.train, plan.modules, folds, frozen=plan.frozen)


def folds_beside(work: TrainingJob) -> tuple[AdapterState, ...]:
    """The folds that are to be installed as the anchor: none where they are merged into the base, here."""
    run = work.context.run_id
    return adapted.place(work.model, folds_up_to(run, work.broadcast), work.config.anchor, run)


def _personal_part(adapter: AdapterState, plan: Plan) -> AdapterState:
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if plan.keeps(name)}
    return AdapterState(lora=keep_factors(adapter, plan.kept_factors).lora, tensors=tensors)


def _check_finite(adapter: AdapterState, number: int) -> None:
    """Raises DivergedError where a value is not finite: it would spoil every later round, here and elsewhere."""
    name = not_finite(adapter)
    if name:
        raise DivergedError(f"training diverged: {name} is not finite at the end of round {number}; lower train.lr")


def _check_ranks(model: adapted.AdaptedModel, broadcast: Broadcast, info: ClientInfo, context: Context) -> None:
    """A server may not ask for more than this client's hardware affords, in all modules together, sent or not."""
    asked = broadcast.plan.unfrozen(broadcast.adapter)
    ranks = {name: rank for name, rank in adapted.ranks(model, asked).items() if name in model.layers}
    shapes = {module: shape_of(layer) for module, layer in model.layers.items()}
    own = {module: info.rank_of(module) for module in shapes}
    sent, affords = count_numbers(ranks, shapes), count_numbers(own, shapes)
    if sent > affords:
        key = next((key for key in ("max-rank", "rank") if key in context.node_config), "")
        largest = max(ranks, key=lambda module: ranks[module] - own[module])
        raise ConfigError(
            f"the server sent factors of {sent:,} numbers, client {info.client_id} affords {affords:,}; {largest} has "
            f"rank {ranks[largest]}, expected {own[largest]}{f' (node config: {key})' if key else ''}"
        )


def _info(config: Config, context: Context) -> ClientInfo:
    client_id = client_id_of(context)
    rank = rules.rank(config, context.node_config, client_id)
    task, split = check_task(config), prepare(config)
    form_of(split.rows.column_names, config.data, task)  # a column that is missing is said first
    rows = train_rows(config, client_id, rules.own_data(context.node_config))
    rules.check_steps(config.train, context.node_config, schedule.steps_per_round(config.train, rows))
    return ClientInfo(
        client_id=client_id,
        rank=rank,
        alpha=config.lora.alpha,
        num_examples=rows,
        rslora=config.lora.rslora,
        rank_pattern=configuration.rank_pattern(config.lora),
        class_names=task.class_names(split.rows, config.data),
    )
