"""Local training of several clients at once.

The batches of all clients go through the shared base model together. Each client keeps its own adapter and optimizer,
and its result is the same as if it had been trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedlora.adapters import AdapterState
from fedlora.common.errors import AdapterError
from fedlora.config import TrainConfig
from fedlora.data import Example
from fedlora.exchange import Plan
from fedlora.exchange.stages import Stage
from fedlora.models.adapted import AdaptedModel
from fedlora.models.dropout import Draws, draws_per_client
from fedlora.models.per_example import RowGradients, row_gradients
from fedlora.models.stacked import Stack, stacked
from fedlora.tasks.base import Batch, Task
from fedlora.tasks.checked import each_loss, row_losses
from fedlora.tasks.groups import grouped

from .private import RowPrivacy
from .projections import projection
from .terms import penalty
from .trainer import LocalSteps, TrainResult, finite_mean


@dataclass(frozen=True)
class Member:
    """One client of a batch.

    Args:
        adapter: the adapter from which this client starts training.
        examples: the client's own examples.
        seed: seed of its order of examples and of its dropout.
        kept: the g of a term of the plan; see `terms.kept_before`.
        privacy: what protects single rows; all members have one, or none has.
    """

    adapter: AdapterState
    examples: Sequence[Example]
    seed: int
    kept: AdapterState | None = None
    privacy: RowPrivacy | None = None


def train(
    model: AdaptedModel,
    members: Sequence[Member],
    config: TrainConfig,
    *,
    plan: Plan,
    folds: tuple[AdapterState, ...] = (),
    number: int,
    rounds: int,
    on_step: Callable[[int, int, int, float], None] = lambda member, step, steps, loss: None,
    stages: Sequence[Stage] = (),
) -> list[tuple[AdapterState, TrainResult] | AdapterError]:
    """Train each member for one round, with the same batches, losses and steps as `trainer.train` would alone.

    In each step, the next batches of all members that still have steps go through the model as one batch. Their losses
    are added, and each member's gradient reaches only its own factors. The only difference from training alone is the
    order of floating point sums. `seconds` of a result is a share of the wall time, in proportion to a member's steps.

    Args:
        model: the model.
        members: the clients, at least one.
        config: the run's section train, for all members.
        plan: which factors are trained, and the terms of the loss; tensors trained in full are trained too.
        folds: the folds that stand beside all adapters as the anchor.
        number: number of the round, from 1.
        rounds: number of rounds of the whole run.
        on_step: called after each member's step with (member, step, steps, loss).
        stages: privacy stages; see `trainer.train`.

    Returns:
        For each member, in order: the trained adapter and its result, or the error that ended its training.

    Raises:
        NotStackable: the model cannot train several clients in one batch.
    """
    began = time.perf_counter()
    order = sorted(range(len(members)), key=lambda m: -len(members[m].examples))  # members with most steps first
    ends: list[AdapterError | None] = [None] * len(order)
    model.model.train()
    own_dropout = draws_per_client(model.model)
    adapters = [members[m].adapter for m in order]
    private = members[0].privacy is not None
    with (
        stacked(model, adapters, plan.train, plan.modules, folds, frozen=plan.frozen) as stack,
        row_gradients(model, stack) if private else nullcontext() as rows,
    ):
        everyone = [
            LocalSteps(
                slot,
                members[m].examples,
                config,
                number=number,
                rounds=rounds,
                seed=members[m].seed,
                plan=plan,
                penalty=penalty(slot.pairs, plan, members[m].kept),
                project=projection(model, slot.pairs, plan),
                stages=stages,
                privacy=members[m].privacy,
                heads=[*model.tensors],
                vary=model.task.augmented,
            )
            for m, slot in zip(order, stack.slots, strict=True)
        ]
        for step in range(everyone[0].steps):
            stack.active = sum(local.steps > step for local in everyone)
            if rows is None:
                losses = _gradients(model, stack, everyone[: stack.active], step, own_dropout)
                stack.share_gradients()
            else:
                losses = _private_gradients(model, stack, rows, everyone[: stack.active], own_dropout)
            for passed in range(everyone[0].passes - 1):
                for local in everyone[: stack.active]:
                    local.after_pass(passed)
                stack.drop_gradients()
                _gradients(model, stack, everyone[: stack.active], step, own_dropout)
                stack.share_gradients()
            for place, (local, loss) in enumerate(zip(everyone, losses, strict=False)):
                if ends[place] is not None:
                    continue
                try:
                    with record_function("fedlora/optimizer"):
                        local.take(step, loss)
                except AdapterError as error:
                    ends[place] = error
                    continue
                on_step(order[place], step + 1, local.steps, loss)
            stack.drop_gradients()
        share = (time.perf_counter() - began) / sum(local.steps for local in everyone)
        done = [
            end or (stack.read(place), local.result(share * local.steps))
            for place, (local, end) in enumerate(zip(everyone, ends, strict=True))
        ]
    return [done[order.index(m)] for m in range(len(members))]


def _gradients(
    model: AdaptedModel, stack: Stack, everyone: Sequence[LocalSteps], step: int, own_dropout: bool
) -> list[float]:
    """Each client's loss in a step; adds its gradients to the stack."""
    with record_function("fedlora/data"):
        parts = zip(*(local.batches(step) for local in everyone), strict=True)
        batches = [model.task.collate([e for examples in part for e in examples], model.base.pad_id) for part in parts]
        counts = [[int(own.sum()) for own in model.task.counts(batch).chunk(len(everyone))] for batch in batches]
    totals = [sum(of_client) for of_client in zip(*counts, strict=True)]
    losses = [0.0] * len(everyone)
    for batch in batches:
        tokens = model.task.tokens(batch)
        own_tokens = tokens.chunk(len(everyone))
        for local, own in zip(everyone, own_tokens, strict=True):
            local.tokens += int(own.sum())
        groups = stack.begin(len(tokens), int(tokens.max()))
        lengths = [int(own.max()) for own in own_tokens]
        draws = Draws([local.draws for local in everyone], lengths) if own_dropout else nullcontext()
        with record_function("fedlora/forward"), draws, grouped(groups):
            each = _losses(model.task, model.model, batch, len(tokens), totals)
        with record_function("fedlora/backward"):
            each.sum().backward()
            losses = [loss + float(more) for loss, more in zip(losses, each.detach(), strict=True)]
    return losses


def _private_gradients(
    model: AdaptedModel, stack: Stack, rows: RowGradients, everyone: Sequence[LocalSteps], own_dropout: bool
) -> list[float]:
    """Each client's loss in a step; sets each client's gradients to its noised mean.

    Clients draw different numbers of rows. A client with fewer than another one in a pass repeats a row of its own, or
    its first one, with the weight 0.
    """
    drawn = [local.drawn() for local in everyone]
    losses: list[list[Tensor]] = [[] for _ in everyone]
    for passed in range(max(map(len, drawn))):
        parts = [own[passed] if passed < len(own) else [] for own in drawn]
        size = max(map(len, parts))
        full = [[*part, *[local.filler] * (size - len(part))] for local, part in zip(everyone, parts, strict=True)]
        batch = model.task.collate([example for part in full for example in part], model.base.pad_id)
        tokens = model.task.tokens(batch)
        lengths = [int(own.max()) for own in tokens.chunk(len(everyone))]
        groups = rows.begin(len(tokens), int(tokens.max()))
        draws = Draws([local.draws for local in everyone], lengths) if own_dropout else nullcontext()
        with record_function("fedlora/forward"), draws, grouped(groups):
            each = row_losses(model.task, model.model, batch, len(tokens))
        counted = torch.tensor([place < len(part) for part in parts for place in range(size)], device=each.device)
        with record_function("fedlora/backward"):
            each[counted].sum().backward()
        for place, (local, part) in enumerate(zip(everyone, parts, strict=True)):
            local.tokens += int(tokens[place * size : place * size + len(part)].sum())
            local.add_rows(rows.found, place * size, len(part))
            losses[place].append(each.detach()[place * size : place * size + len(part)])
        stack.drop_gradients()
    rows.begin(0, 0)
    for local in everyone:
        local.finish_rows()
    return [finite_mean(own) for own in losses]


def _losses(task: Task, model: nn.Module, batch: Batch, rows: int, totals: Sequence[int]) -> Tensor:
    """Each client's part of its step's loss: the sum of its losses in this batch, over their number in the step."""
    each, row = each_loss(task, model, batch)
    client = row // (rows // len(totals))
    summed = torch.zeros(len(totals), device=each.device).index_add(0, client, each)
    return summed / torch.tensor(totals, device=each.device)
