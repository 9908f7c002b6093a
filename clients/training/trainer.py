"""Local training of one client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedlora.common.errors import DivergedError
from fedlora.config import TrainConfig, steps_per_round
from fedlora.data import Example, batch_at
from fedlora.exchange import Plan
from fedlora.exchange.stages import Stage
from fedlora.models.dropout import Draws, draws_per_client
from fedlora.models.per_example import RowGradients
from fedlora.models.trainable import Trainable
from fedlora.tasks.base import Task
from fedlora.tasks.checked import mean_loss, row_losses
from fedlora.tasks.groups import grouped

from ..optimizers.registry import optimizer
from .private import ClippedSum, RowPrivacy
from .schedule import hash_seed, lr_factor, warmup_of
from .terms import proximal

_WHOLE = Plan()


@dataclass(frozen=True)
class TrainResult:
    """The numbers of a client's training in one round.

    Args:
        loss: mean training loss over the round's steps.
        last_loss: training loss of the last step.
        steps: number of optimizer steps.
        tokens: number of tokens that went through the model, without padding.
        seconds: wall time in seconds.
        rate: sum of the steps' learning rates; 0 where nothing is trained.
    """

    loss: float
    last_loss: float
    steps: int
    tokens: int
    seconds: float
    rate: float = 0.0


def train(
    task: Task,
    model: nn.Module,
    trained: Trainable,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    pad_id: int,
    number: int,
    rounds: int,
    seed: int,
    plan: Plan = _WHOLE,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    penalty: Callable[[], None] = lambda: None,
    project: Callable[[], None] = lambda: None,
    stages: Sequence[Stage] = (),
    privacy: RowPrivacy | None = None,
    rows: RowGradients | None = None,
    heads: Sequence[str] = (),
) -> TrainResult:
    """Train a client's parameters in place for one round.

    The loss of an optimizer step is exactly the mean over all its labelled tokens (or over its examples, for
    classification), however they are divided among `train.accumulate` forward passes. The learning rate follows one
    schedule across all rounds, and the batches of a round continue where those of the last round ended. The
    optimizer's state starts anew in each round, since the server has changed the factors.

    Args:
        task: defines the losses.
        model: the model with the adapter.
        trained: the parameters to train.
        examples: the client's own examples.
        config: the run's section train.
        pad_id: token that fills up shorter rows of a batch on the right.
        number: number of the round, from 1.
        rounds: number of rounds of the whole run, for the schedule.
        seed: seed of this client's order of examples and of dropout.
        plan: says when the present adapter began.
        on_step: called after each step with (step, steps, loss).
        penalty: called after each pass; may add a term's gradient to the parameters' gradients.
        project: called before the first step and after each; may change the parameters (see `projections`).
        stages: privacy stages, which may change the gradients before `penalty` is called.
        privacy: what protects single rows. The rows of a step are then drawn at random, its gradient has noise, and a
            loss that is not finite is no error, which would tell of a row.
        rows: with `privacy`, where the gradients of single rows are recorded.
        heads: with `privacy`, names of the tensors trained in full.

    Raises:
        DivergedError: the loss is not finite.
    """
    began = time.perf_counter()
    local = LocalSteps(
        trained,
        examples,
        config,
        number=number,
        rounds=rounds,
        seed=seed,
        plan=plan,
        penalty=penalty,
        project=project,
        stages=stages,
        privacy=privacy,
        heads=heads,
        vary=task.augmented,
    )
    torch.manual_seed(hash_seed(seed, number))  # for everything that draws from torch's own generator
    model.train()
    own_dropout = draws_per_client(model)
    try:
        for step in range(local.steps):
            if rows is not None:
                total = private_gradients(task, model, local, rows, pad_id, own_dropout=own_dropout)
                with record_function("fedlora/optimizer"):
                    local.take(step, total)
                on_step(step + 1, local.steps, total)
                continue
            total = step_gradients(task, model, local, step, pad_id, own_dropout=own_dropout)
            for passed in range(local.passes - 1):
                local.after_pass(passed)
                step_gradients(task, model, local, step, pad_id, own_dropout=own_dropout)
            with record_function("fedlora/optimizer"):
                local.take(step, total)
            on_step(step + 1, local.steps, total)
    finally:  # otherwise the gradients of a failed step would be part of the next training's first step
        for parameter in trained.parameters:
            parameter.grad = None
    return local.result(time.perf_counter() - began)


def step_gradients(
    task: Task, model: nn.Module, local: LocalSteps, step: int, pad_id: int, *, own_dropout: bool = False
) -> float:
    """The loss of a step; adds its gradients to the parameters."""
    with record_function("fedlora/data"):
        batches = [task.collate(part, pad_id) for part in local.batches(step)]
        labelled = [int(task.counts(batch).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, labelled, strict=True):
        tokens = task.tokens(batch)
        local.tokens += int(tokens.sum())
        draws = Draws([local.draws], [int(tokens.max())]) if own_dropout else nullcontext()
        with record_function("fedlora/forward"), draws:
            loss = mean_loss(task, model, batch) * (count / sum(labelled))
        with record_function("fedlora/backward"):
            loss.backward()
            total += float(loss.detach())
    return total


def private_gradients(
    task: Task, model: nn.Module, local: LocalSteps, rows: RowGradients, pad_id: int, *, own_dropout: bool = False
) -> float:
    """The mean loss of a step's rows, 0 if none was drawn; sets the parameters' gradients to the noised mean."""
    losses: list[Tensor] = []
    for part in local.drawn():
        with record_function("fedlora/data"):
            batch = task.collate(part, pad_id)
        tokens = task.tokens(batch)
        local.tokens += int(tokens.sum())
        draws = Draws([local.draws], [int(tokens.max())]) if own_dropout else nullcontext()
        groups = rows.begin(len(part), int(tokens.max()))
        with record_function("fedlora/forward"), draws, grouped(groups):
            each = row_losses(task, model, batch, len(part))
        with record_function("fedlora/backward"):
            each.sum().backward()
            local.add_rows(rows.found, 0, len(part))
        losses.append(each.detach())
    rows.begin(0, 0)
    local.finish_rows()
    return finite_mean(losses)


def finite_mean(losses: Sequence[Tensor]) -> float:
    """The mean of the losses that are finite; 0 if there are none."""
    every = torch.cat([*losses]) if losses else torch.zeros(0)
    finite = every[torch.isfinite(every)]
    return float(finite.mean()) if len(finite) else 0.0


class LocalSteps:
    """One client's steps in a round: batches, optimizer, schedule and losses. The caller computes the gradients.

    Attributes:
        steps: number of optimizer steps in the round.
        passes: number of gradients that each step needs.
        losses: losses of the steps so far.
        tokens: number of tokens that went through the model so far, without padding; the caller counts them.
        rate: sum of the learning rates of the steps so far.
        draws: random generator of this client's dropout in this round.
    """

    def __init__(
        self,
        trained: Trainable,
        examples: Sequence[Example],
        config: TrainConfig,
        *,
        number: int,
        rounds: int,
        seed: int,
        plan: Plan = _WHOLE,
        penalty: Callable[[], None] = lambda: None,
        project: Callable[[], None] = lambda: None,
        stages: Sequence[Stage] = (),
        privacy: RowPrivacy | None = None,
        heads: Sequence[str] = (),
        vary: Callable[[Sequence[Example], str, int], Sequence[Example]] = lambda examples, names, seed: examples,
    ) -> None:
        """The arguments are those of `train`, and `vary` is `Task.augmented`."""
        self.steps = steps_per_round(config, len(examples))
        self.losses: list[float] = []
        self.tokens, self.rate = 0, 0.0
        parameters = trained.parameters
        self.draws = torch.Generator(parameters[0].device).manual_seed(hash_seed(seed, number))
        self._parameters, self._examples, self._config, self._penalty = parameters, examples, config, penalty
        self._seed, self._round, self._rounds, self._stages = seed, number, rounds, stages
        self._warmup = warmup_of(config, plan, self.steps, rounds)
        method = optimizer(config)
        self.passes = method.passes
        self._optimizer = method.begin(trained, config)
        self._project = project
        project()
        self._proximal = proximal(trained, config.prox_mu, config.prox_of)
        self._privacy = privacy
        self._sum = ClippedSum(privacy, trained, heads) if privacy else None
        self._vary, self._drawn = vary, 0

    def drawn(self) -> list[Sequence[Example]]:
        """With privacy of rows: the examples of each forward pass of the next step, drawn at random."""
        assert self._privacy is not None
        self._drawn += 1
        parts = self._privacy.drawn(self._examples, self._config.batch_size)
        return [self._varied(part, self._drawn - 1, number) for number, part in enumerate(parts)]

    @property
    def filler(self) -> Example:
        """One of the client's examples, to fill up a batch with, where it does not count."""
        return self._examples[0]

    def add_rows(self, found: Mapping[str, Tensor], first: int, count: int) -> None:
        """With privacy of rows: the gradients of this client's rows of a batch; see `ClippedSum.add`."""
        assert self._sum is not None
        self._sum.add(found, first, count)

    def finish_rows(self) -> None:
        """With privacy of rows: set the gradients of a step whose rows were all added."""
        assert self._sum is not None
        self._sum.finish()

    def batches(self, step: int) -> list[Sequence[Example]]:
        """The examples of each forward pass of a step; they are the same each time."""
        size, parts = self._config.batch_size, self._config.accumulate
        first = self._position(step) * parts
        walk = [batch_at(len(self._examples), size, first + part, self._seed) for part in range(parts)]
        return [self._varied([self._examples[i] for i in chosen], step, number) for number, chosen in enumerate(walk)]

    def take(self, step: int, loss: float) -> None:
        """Make one optimizer step with the gradients that the parameters have, then clear the gradients.

        Args:
            step: number of the step within the round, from 0.
            loss: loss of the step.

        Raises:
            DivergedError: the loss is not finite.
        """
        config = self._config
        if not math.isfinite(loss):
            raise DivergedError(diverged(loss, step, self._round))
        self._complete()
        rate = config.lr * lr_factor(config, self._position(step), self._rounds * self.steps, self._warmup)
        try:
            self._optimizer.step(rate)
        except torch.linalg.LinAlgError as error:
            raise DivergedError(
                f"training diverged: {config.optimizer} cannot decompose the factors or their gradients at step "
                f"{step + 1} of round {self._round} ({str(error).splitlines()[0]}); lower train.lr"
            ) from error
        self._project()
        self._let_go()
        self.losses.append(loss)
        self.rate += rate

    def after_pass(self, number: int) -> None:
        """Called between two passes of one step; clears the gradients."""
        self._complete()
        self._optimizer.after_pass(number)
        self._let_go()

    def _complete(self) -> None:
        """What every gradient goes through before the optimizer sees it: the privacy stages, then the penalties."""
        for stage in self._stages:
            stage.gradients(self._parameters)
        self._proximal()
        self._penalty()

    def _let_go(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def result(self, seconds: float) -> TrainResult:
        return TrainResult(
            loss=sum(self.losses) / len(self.losses),
            last_loss=self.losses[-1],
            steps=self.steps,
            tokens=self.tokens,
            seconds=seconds,
            rate=self.rate,
        )

    def _varied(self, examples: Sequence[Example], step: int, number: int) -> Sequence[Example]:
        """The examples of a forward pass as `train.augment` changes them."""
        return self._vary(examples, self._config.augment, hash_seed(self._seed, self._round, step, number))

    def _position(self, step: int) -> int:
        """The step's number in the whole run."""
        return (self._round - 1) * self.steps + step


def diverged(loss: float, step: int, number: int) -> str:
    """The message of a DivergedError; it blames the learning rate only if the first step's loss was finite."""
    if step:
        return f"training diverged: loss {loss} at step {step + 1} of round {number}; lower train.lr"
    return (
        f"training diverged: loss {loss} at step 1 of round {number}, before anything was trained: the adapter that "
        "the server sent gives no finite loss here"
    )
