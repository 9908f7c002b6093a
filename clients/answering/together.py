"""Training messages of several clients in one process, answered by one computation where the model allows it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import psutil
import torch
from flwr.app import Context, Error, RecordDict

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import FedLoraError
from fedlora.common.once import say_once
from fedlora.config import clients_at_once
from fedlora.exchange.stages import stages
from fedlora.models import adapted, base_fingerprint
from fedlora.models.injection import shape_of
from fedlora.models.stacked import NotStackable

from ..node import memory, rules
from ..optimizers.registry import optimizer
from ..training import cohort
from . import refusals, rows, single
from .single import TrainingJob

# Batches with more tokens are no faster, since the machine is fully used. Measured on a CPU with a 4-bit base.
_ENOUGH_TOKENS = {"cpu": 512, "cuda": 16384}
_SHARE_OF_FREE = 0.5
_LOOKED_AT = 8  # number of a client's examples whose lengths are looked at
Folds = tuple[AdapterState, ...]
_APART = "clients are trained one at a time: %s"
_log = logging.getLogger("fedlora")


def how_many(context: Context) -> int:
    """The number of clients to train at once, by `train.clients-at-once`.

    With auto, it is the number that uses the machine fully, by the length of this client's examples, or fewer if half
    of the free memory allows no more. If the client's rows cannot be read, it is 1; the answer to the client's message
    will say why.
    """
    try:
        config = rules.config_of(context)
        if clients_at_once(config.train):
            return clients_at_once(config.train)
        model = adapted.adapted_model(config.model, config.lora)
        examples = rows.training_examples(config, context)
        tokens = config.train.batch_size * max(example.size for example in examples[:_LOOKED_AT])
    except Exception:
        return 1
    device = model.base.device
    enough = _ENOUGH_TOKENS.get(device.type, _ENOUGH_TOKENS["cuda"]) // tokens
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, min(enough, int(_SHARE_OF_FREE * free / (tokens * bytes_per_token(model) + bytes_beside(model)))))


def bytes_per_token(model: adapted.AdaptedModel) -> int:
    """A rough estimate of the bytes that training stores for one token until the backward pass."""
    config = model.base.model.config.get_text_config(decoder=True)
    layers, hidden = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    outputs = model.task.outputs(config)
    return model.base.compute_dtype.itemsize * layers * (16 * hidden + 6 * wide) + 4 * 4 * outputs


def bytes_beside(model: adapted.AdaptedModel) -> int:
    """The bytes that one client's adapter kind stores beside the layers: a product and its gradient, in fp32."""
    return 8 * sum(math.prod(shape_of(layer)) for layer in model.layers.values()) if model.kind.dense else 0


def train(requests: Sequence[tuple[RecordDict, Context]]) -> list[RecordDict | Error]:
    """The answers to several clients' training messages, in order. Each is the same as from `single.answer`."""
    answers: dict[int, RecordDict | Error] = {}
    groups: list[tuple[tuple[object, ...], Folds, dict[int, TrainingJob]]] = []
    for number, (content, context) in enumerate(requests):
        try:
            work = single.begin(content, context)
            folds = single.folds_beside(work)
        except Exception as error:
            answers[number] = refusals.refusal(error, context.node_config)
            continue
        sent = work.broadcast
        key = (work.config, sent.round, sent.job, sent.plan, sent.base_version)
        group = next((each for other, theirs, each in groups if other == key and _same(theirs, folds)), None)
        if group is None:
            group = {}
            groups.append((key, folds, group))
        group[number] = work
    for _, folds, group in groups:
        answers |= zip(group, _answers(list(group.values()), folds), strict=True)
    return [answers[number] for number in range(len(requests))]


def describe(requests: Sequence[tuple[RecordDict, Context]]) -> list[RecordDict | Error]:
    """The answers to the question who these clients are, in order. Each is the same as from `single.answer`.

    The base model's files are looked at once for all of them.
    """
    fingerprint_of = functools.cache(base_fingerprint)
    answers: list[RecordDict | Error] = []
    for content, context in requests:
        try:
            answers.append(single.describe(content, context, fingerprint_of))
        except Exception as error:
            answers.append(refusals.refusal(error, context.node_config))
    return answers


def _same(left: Folds, right: Folds) -> bool:
    """Whether these folds are one anchor. Some strategies send each client an anchor of its own."""
    return len(left) == len(right) and all(
        a is b or (a.lora.keys() == b.lora.keys() and all(_equal(f, b.lora[name]) for name, f in a.lora.items()))
        for a, b in zip(left, right, strict=True)
    )


def _equal(left: LoraFactors, right: LoraFactors) -> bool:
    """Bit for bit; folds have no core."""
    return left.scaling == right.scaling and torch.equal(left.A, right.A) and torch.equal(left.B, right.B)


def _answers(works: Sequence[TrainingJob], folds: Folds) -> list[RecordDict | Error]:
    """The answers of clients that train as one batch, or one at a time if the model does not allow a batch."""
    why = _why_not(works[0])
    if why:
        say_once(logging.INFO, _APART, why)
    if why or len(works) == 1:
        return [_alone(work) for work in works]
    try:
        return _as_one(works, folds)
    except NotStackable as error:
        say_once(logging.INFO, _APART, str(error))
        return [_alone(work) for work in works]
    except Exception as error:
        if not memory.ran_out(error):
            return [refusals.refusal(error, work.context.node_config) for work in works]
    half = (len(works) + 1) // 2  # outside the handler, which would keep the failed batch's memory
    _log.warning("memory ran out with %d clients at once; continuing with %d (train.clients-at-once)", len(works), half)
    return [*_answers(works[:half], folds), *_answers(works[half:], folds)]


def _as_one(works: Sequence[TrainingJob], folds: Folds) -> list[RecordDict | Error]:
    one = works[0]
    ends = cohort.train(
        one.model,
        [cohort.Member(work.start(), work.examples, work.seed, work.kept, work.privacy) for work in works],
        one.config.train,
        plan=one.broadcast.plan,
        folds=folds,
        number=one.broadcast.round,
        rounds=one.config.federation.rounds,
        on_step=lambda member, step, steps, loss: works[member].tell(step, steps, loss),
        stages=stages(one.config.privacy),
    )
    answers: list[RecordDict | Error] = []
    for work, end in zip(works, ends, strict=True):
        try:
            if isinstance(end, FedLoraError):
                raise end
            answers.append(single.finish(work, *end))
        except Exception as error:
            answers.append(refusals.refusal(error, work.context.node_config))
    return answers


def _alone(work: TrainingJob) -> RecordDict | Error:
    try:
        return single.train_alone(work)
    except Exception as error:
        return refusals.refusal(error, work.context.node_config)


def _why_not(work: TrainingJob) -> str:
    """The reason why these clients are trained one at a time; empty if they can be one batch."""
    config = work.config
    if work.broadcast.job != "train":
        return f"the {work.broadcast.job} of round {work.broadcast.round} is measured for each client alone"
    if not optimizer(config.train).shares_batch:
        return f"train.optimizer = {config.train.optimizer!r} cannot step clients whose factors lie in one tensor"
    if config.model.gradient_checkpointing:
        return "with model.gradient-checkpointing, dropout cannot be drawn for each client separately"
    return ""
